//! What datasets, tokenizers and models have in common as rows that a job makes: how they are listed, how
//! one is named in a request before it is ready, and how one is deleted. Macros, since checked SQL names its
//! table.

/// A page of a project's rows, as `$object`s: `Result<Json<List<_>>, ApiError>`. `$select` is the file's
/// macro of what a row is read from, `$limit` the items of a page that asks for no number.
macro_rules! list_made {
    ($select:ident in $table:literal as $object:ident, $state:expr, $project_id:expr, $query:expr, $limit:expr) => {{
        let (state, query): (&crate::state::AppState, _) = ($state, $query);
        let page = crate::page::Page::asked(query.limit.unwrap_or($limit), query.order, query.after, async |id| {
            sqlx::query_scalar!("SELECT created_at FROM " + $table + " WHERE id = $1 AND project_id = $2", id, $project_id)
                .fetch_optional(&state.db)
                .await
        })
        .await?;
        let rows = crate::page::fetch_page!(
            @ [$select] []
            &state.db,
            &page,
            "AND project_id = $4 AND ($5::text IS NULL OR state = $5) AND ($6::text IS NULL OR name = $6)",
            $project_id,
            query.state.map(|state| state.0.as_str()),
            query.name,
        )?;
        let objects = rows.into_iter().map($object::from).collect();
        Ok(axum::Json(crate::page::List::of(objects, &page, |object: &$object| &object.id)))
    }};
}
pub(crate) use list_made;

/// The job to wait for before the row can be used, if it is not ready: `Result<Option<String>, ApiError>`.
/// Locks the row against deletion until the transaction ends, and against nothing weaker: whoever moves
/// its job has that locked and comes for the row next. `$param` is the field that names it.
macro_rules! find_usable {
    ($what:literal in $table:literal, $conn:expr, $project_id:expr, $id:expr, $param:expr) => {{
        let row = sqlx::query!(
            "SELECT state AS \"state: lathe_jobs::state::ResourceState\", job_id FROM "
                + $table
                + " WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL FOR KEY SHARE",
            $id,
            $project_id,
        )
        .fetch_optional($conn)
        .await?
        .ok_or_else(|| crate::resource::unknown($what, $id, $param))?;
        match row.state {
            lathe_jobs::state::ResourceState::Ready => Ok(None),
            lathe_jobs::state::ResourceState::Queued | lathe_jobs::state::ResourceState::Running => Ok(Some(row.job_id)),
            lathe_jobs::state::ResourceState::Failed => Err(crate::resource::has_failed($what, $id, $param)),
        }
    }};
}
pub(crate) use find_usable;

/// Deletes the row, with the making of what is not made yet, unless `$users` (the query of the unfinished
/// jobs that need `$1`, but for the job `$2` that makes it) finds any. `$deed` is its name in the audit log.
macro_rules! delete_made {
    ($what:literal in $table:literal, $deed:expr, $state:expr, $caller:expr, $id:expr, $users:literal) => {{
        let (state, caller, id): (&crate::state::AppState, crate::caller::Project, String) = ($state, $caller, $id);
        let gone = || crate::problem::ApiError::not_found($what, &id);
        let mut conn = state.db.acquire().await?;
        let job_id = sqlx::query_scalar!(
            "SELECT job_id FROM " + $table + " WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL",
            id,
            caller.project_id
        )
        .fetch_optional(&mut *conn)
        .await?
        .ok_or_else(gone)?;
        let users = sqlx::query_scalar!($users, id, job_id).fetch_all(&mut *conn).await?;
        crate::resource::refuse_users($what, &id, &users)?;
        // Committed before the row is locked: whoever holds a job may be about to write what it makes.
        crate::resource::stop_making(&mut conn, &job_id).await?;
        let mut tx = sqlx::Connection::begin(&mut *conn).await?;
        let artifact =
            sqlx::query_scalar!("SELECT artifact FROM " + $table + " WHERE id = $1 AND deleted_at IS NULL FOR UPDATE", id)
                .fetch_optional(&mut *tx)
                .await?
                .ok_or_else(gone)?;
        let users = sqlx::query_scalar!($users, id, job_id).fetch_all(&mut *tx).await?;
        crate::resource::refuse_users($what, &id, &users)?;
        sqlx::query!("UPDATE " + $table + " SET deleted_at = now(), artifact = NULL WHERE id = $1", id).execute(&mut *tx).await?;
        lathe_jobs::audit::record(&mut tx, caller.did($deed, &id)).await?;
        tx.commit().await?;
        crate::resource::remove_artifacts(state, artifact.into_iter().collect()).await;
        Ok(axum::Json(crate::resource::Deleted { id, object: $what, deleted: true }))
    }};
}
pub(crate) use delete_made;
