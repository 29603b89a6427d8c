//! `lathe key`: keys from the shell, for whoever may reach the database.

use lathe_jobs::audit::{self, Actor, Deed, Entry};
use sqlx::{Connection, PgConnection};

use crate::{
    auth::{self, Scope},
    config::KeyCommand,
};

/// Does what was asked and gives the text to print.
pub async fn run(conn: &mut PgConnection, command: &KeyCommand) -> Result<String, KeyError> {
    match command {
        KeyCommand::Create { project, name, admin } => create(conn, project, name.as_deref(), *admin).await,
        KeyCommand::List { project } => list(conn, project.as_deref()).await,
        KeyCommand::Revoke { id } => revoke(conn, id).await,
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("there is no key {0}; `lathe key list` shows them")]
    Unknown(String),
    #[error("the database refused: {0}")]
    Database(#[from] sqlx::Error),
}

async fn create(conn: &mut PgConnection, project: &str, name: Option<&str>, admin: bool) -> Result<String, KeyError> {
    let made = match project {
        "default" => auth::DEFAULT_PROJECT.to_owned(),
        _ => lathe_jobs::ids::new("proj"),
    };
    let mut tx = conn.begin().await?;
    let inserted = sqlx::query!("INSERT INTO projects (id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING", made, project)
        .execute(&mut *tx)
        .await?;
    let project_id = sqlx::query_scalar!("SELECT id FROM projects WHERE name = $1", project).fetch_one(&mut *tx).await?;
    if inserted.rows_affected() == 1 {
        audit::record(&mut tx, by_shell(&project_id, Deed::ProjectCreated, &project_id)).await?;
    }
    let key = auth::create_key(&mut tx, &project_id, name, if admin { Scope::Admin } else { Scope::Project }).await?;
    audit::record(&mut tx, by_shell(&project_id, Deed::KeyCreated, &key.id)).await?;
    tx.commit().await?;
    Ok(format!("{}\n", key.secret))
}

async fn list(conn: &mut PgConnection, project: Option<&str>) -> Result<String, KeyError> {
    let rows = sqlx::query!(
        r#"SELECT k.id, p.name AS project, k.name, k.scope, k.hint, k.revoked_at IS NOT NULL AS "revoked!"
           FROM api_keys k JOIN projects p ON p.id = k.project_id
           WHERE $1::text IS NULL OR p.name = $1
           ORDER BY k.created_at, k.id"#,
        project,
    )
    .fetch_all(conn)
    .await?;
    let mut text = format!("{:32}{:20}{:9}{:9}{:10}NAME\n", "ID", "PROJECT", "SCOPE", "ENDS IN", "STATE");
    for row in rows {
        let state = if row.revoked { "revoked" } else { "active" };
        text += &format!(
            "{:32}{:20}{:9}{:9}{:10}{}\n",
            row.id,
            row.project,
            row.scope,
            row.hint,
            state,
            row.name.unwrap_or_default()
        );
    }
    Ok(text)
}

async fn revoke(conn: &mut PgConnection, id: &str) -> Result<String, KeyError> {
    let mut tx = conn.begin().await?;
    let project_id = sqlx::query_scalar!(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1 RETURNING project_id",
        id
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(|| KeyError::Unknown(id.to_owned()))?;
    audit::record(&mut tx, by_shell(&project_id, Deed::KeyRevoked, id)).await?;
    tx.commit().await?;
    Ok(format!("revoked {id}\n"))
}

fn by_shell<'a>(project_id: &'a str, deed: Deed, resource_id: &'a str) -> Entry<'a> {
    Entry { project_id, actor: Actor::Shell, deed, resource_id }
}
