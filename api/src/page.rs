//! Lists: pages over (created_at, id), newest first unless asked otherwise.
//!
//! `after` is the id of the last item of the page before; its row may have been deleted meanwhile,
//! since tombstones stay. A route states its own query type, with its own bounds for `limit`, and
//! makes a [`Page`] of it; the query fetches [`Page::fetch`] rows, one more than the page shows,
//! which is how [`List::of`] knows whether more follow:
//!
//! ```sql
//! WHERE ($2::timestamptz IS NULL
//!        OR CASE WHEN $4 THEN (created_at, id) > ($2, $3) ELSE (created_at, id) < ($2, $3) END)
//! ORDER BY CASE WHEN $4 THEN created_at END, CASE WHEN $4 THEN id END, created_at DESC, id DESC
//! LIMIT $5
//! ```

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

/// Which part of a list is asked for; the parameters of the SQL above.
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
    pub fn after(mut self, id: String, created_at: Option<OffsetDateTime>) -> Result<Page, ApiError> {
        if created_at.is_none() {
            return Err(ApiError::bad_request("after", format!("There is no `{id}` in this list to go on after.")));
        }
        self.after = created_at;
        self.after_id = Some(id);
        Ok(self)
    }

    /// Rows to fetch: one more than the page shows.
    pub fn fetch(&self) -> i64 {
        self.limit as i64 + 1
    }
}

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
