//! The database's schema and this binary's: brought together, or refused in a sentence.

use sqlx::{PgConnection, migrate::MigrateError};

use crate::MIGRATOR;

/// PostgreSQL's major version below which nothing works.
const OLDEST_POSTGRES: i32 = 15;

#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error(
        "the database's schema is version {database}, made by a newer Lathe; this one ({}) knows versions up to {binary}: start the newer one",
        env!("CARGO_PKG_VERSION")
    )]
    Newer { database: i64, binary: i64 },
    #[error("the database's schema is version {database} and this binary needs {binary}; run `lathe migrate`")]
    Older { database: i64, binary: i64 },
    #[error("the database runs PostgreSQL {0}; Lathe needs {OLDEST_POSTGRES} or newer")]
    OldPostgres(i32),
    #[error("a migration failed: {0}")]
    Migrate(#[from] MigrateError),
    #[error("the database cannot be used: {0}")]
    Database(#[from] sqlx::Error),
}

/// The newest version that this binary knows.
pub fn binary_version() -> i64 {
    MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// The version that the database is at; 0 where it is empty.
async fn database_version(conn: &mut PgConnection) -> Result<i64, SchemaError> {
    let number: String = sqlx::query_scalar("SHOW server_version_num").fetch_one(&mut *conn).await?;
    let major = number.parse::<i32>().unwrap_or(0) / 10_000;
    if major < OLDEST_POSTGRES {
        return Err(SchemaError::OldPostgres(major));
    }
    // sqlx makes this table, so it is not in the migrations that checked queries are checked against.
    let there: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL").fetch_one(&mut *conn).await?;
    if !there {
        return Ok(0);
    }
    Ok(sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success").fetch_one(conn).await?)
}

/// Brings the schema up to this binary's, under an advisory lock. Forward only.
pub async fn run(conn: &mut PgConnection) -> Result<(), SchemaError> {
    let (database, binary) = (database_version(conn).await?, binary_version());
    if database > binary {
        return Err(SchemaError::Newer { database, binary });
    }
    Ok(MIGRATOR.run(conn).await?)
}

/// Refuses a schema that is not this binary's.
pub async fn check(conn: &mut PgConnection) -> Result<(), SchemaError> {
    let (database, binary) = (database_version(conn).await?, binary_version());
    match database.cmp(&binary) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(SchemaError::Newer { database, binary }),
        std::cmp::Ordering::Less => Err(SchemaError::Older { database, binary }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[sqlx::test(migrations = false)]
    async fn a_newer_schema_is_refused_and_both_versions_are_named(pool: sqlx::PgPool) {
        let mut conn = pool.acquire().await.expect("a connection");
        assert!(matches!(check(&mut conn).await, Err(SchemaError::Older { database: 0, .. })));
        run(&mut conn).await.expect("an empty database is filled");
        check(&mut conn).await.expect("it fits now");
        run(&mut conn).await.expect("twice is once");
        sqlx::query("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, '', true, '', 0)")
            .execute(&mut *conn)
            .await
            .expect("the table is there");
        let refused = run(&mut conn).await.expect_err("it is newer").to_string();
        assert!(refused.contains("9999") && refused.contains(&binary_version().to_string()), "{refused}");
    }
}
