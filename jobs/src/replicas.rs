//! Serving models.
use sqlx::PgConnection;
pub async fn reap(_conn: &mut PgConnection) -> Result<(), sqlx::Error> { Ok(()) }
