//! Lists: pages over (created_at, id), newest first unless asked otherwise.
//!
//! `after` is the id of the last item of the page before; its row may have been deleted meanwhile,
//! since tombstones stay. A route states its own query type, with its own bounds for `limit`, makes a
//! [`Page`] of it and fetches its rows with [`fetch_page`]: one row more than the page shows, which is
//! how [`List::of`] knows whether more follow.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::problem::ApiError;

/// By time of creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    Asc,
    #[default]
    Desc,
}

/// Which part of a list is asked for.
#[derive(Clone, Debug)]
pub struct Page {
    pub after: Option<OffsetDateTime>,
    pub after_id: Option<String>,
    pub ascending: bool,
    limit: usize,
}

impl Page {
    /// The first page. `limit` has been held against the bounds of the route's query type.
    pub fn first(limit: i64, order: Option<Order>) -> Page {
        Page {
            after: None,
            after_id: None,
            ascending: order.unwrap_or_default() == Order::Asc,
            limit: usize::try_from(limit).unwrap_or(1),
        }
    }

    /// The page after the item `id`, which was created at `created_at`; `None` there says that the
    /// project has no such item.
    fn after(mut self, id: String, created_at: Option<OffsetDateTime>) -> Result<Page, ApiError> {
        if created_at.is_none() {
            return Err(ApiError::no_such_item(&id));
        }
        self.after = created_at;
        self.after_id = Some(id);
        Ok(self)
    }

    /// The page that a query asks for. `created_at` looks an item of the list up.
    pub async fn asked<E>(
        limit: i64,
        order: Option<Order>,
        after: Option<String>,
        created_at: impl AsyncFnOnce(&str) -> Result<Option<OffsetDateTime>, E>,
    ) -> Result<Page, ApiError>
    where
        ApiError: From<E>,
    {
        let page = Page::first(limit, order);
        match after {
            None => Ok(page),
            Some(id) => {
                let created_at = created_at(&id).await?;
                page.after(id, created_at)
            }
        }
    }

    /// Rows to fetch: one more than the page shows.
    pub fn fetch(&self) -> i64 {
        self.limit as i64 + 1
    }
}

/// The rows of a page. The query ends in its `WHERE`, and has columns `created_at` and `id`; its own
/// parameters begin at `$4`. Each direction has a query of its own, without a choice inside, so that
/// both walk the list's index from where the page begins.
macro_rules! fetch_page {
    // By another macro than sqlx's, which knows the row and the beginning of the query.
    (@ [$($query:tt)*] [$($head:tt)*] $db:expr, $page:expr, $select:literal $(, $argument:expr)* $(,)?) => {{
        let page: &crate::page::Page = $page;
        if page.ascending {
            $($query)*!(
                $($head)* $select
                    + " AND (created_at, id) > (coalesce($1, '-infinity'::timestamptz), coalesce($2, '')) ORDER BY created_at, id LIMIT $3",
                page.after,
                page.after_id,
                page.fetch()
                $(, $argument)*
            )
            .fetch_all($db)
            .await
        } else {
            $($query)*!(
                $($head)* $select
                    + " AND (created_at, id) < (coalesce($1, 'infinity'::timestamptz), coalesce($2, '')) ORDER BY created_at DESC, id DESC LIMIT $3",
                page.after,
                page.after_id,
                page.fetch()
                $(, $argument)*
            )
            .fetch_all($db)
            .await
        }
    }};
    ($row:path, $($rest:tt)*) => {
        crate::page::fetch_page!(@ [sqlx::query_as] [$row,] $($rest)*)
    };
}
pub(crate) use fetch_page;

/// A page in OpenAI's shape.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct List<T> {
    #[schema(examples("list"))]
    pub object: &'static str,
    pub data: Vec<T>,
    /// Whether items follow after `last_id`.
    pub has_more: bool,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
}

impl<T> List<T> {
    /// The page of `rows`, which may hold one more than it shows.
    pub fn of(mut rows: Vec<T>, page: &Page, id: impl Fn(&T) -> &str) -> List<T> {
        let has_more = rows.len() > page.limit;
        rows.truncate(page.limit);
        let (first_id, last_id) = (rows.first().map(|row| id(row).to_owned()), rows.last().map(|row| id(row).to_owned()));
        List { object: "list", data: rows, has_more, first_id, last_id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_too_many_says_that_more_follow() {
        let page = Page::first(2, None);
        let list = List::of(vec!["c", "b", "a"], &page, |row| row);
        assert_eq!((list.data, list.has_more), (vec!["c", "b"], true));
        assert_eq!((list.first_id.as_deref(), list.last_id.as_deref()), (Some("c"), Some("b")));
        let list = List::of(vec!["a"], &page, |row| row);
        assert_eq!((list.data, list.has_more), (vec!["a"], false));
    }
}
