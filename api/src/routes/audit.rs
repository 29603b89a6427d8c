//! `/v1/audit`: what was created, changed, deleted, cancelled and revoked, and by which key. Admin keys only.

use axum::{Json, extract::State};
use lathe_jobs::audit::Deed;
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::json;
use time::OffsetDateTime;
use utoipa::{
    IntoParams, PartialSchema, ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, Schema, Type},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Admin,
    page::{List, Order, Page, fetch_page},
    parse::Query,
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_audit_log))
}

/// The name of a deed, as a query gives it.
#[derive(Clone, Copy, Debug)]
pub struct AuditType(Deed);

impl<'de> Deserialize<'de> for AuditType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<AuditType, D::Error> {
        let name = String::deserialize(deserializer)?;
        let deed = Deed::ALL.into_iter().find(|deed| deed.as_str() == name);
        let known = || Deed::ALL.map(|deed| format!("`{}`", deed.as_str())).join(", ");
        deed.map(AuditType).ok_or_else(|| D::Error::custom(format!("unknown type `{name}`, expected one of {}", known())))
    }
}

impl PartialSchema for AuditType {
    fn schema() -> RefOr<Schema> {
        let names = Deed::ALL.iter().map(|deed| json!(deed.as_str()));
        let schema = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names));
        schema.description(Some("What was done to what.")).into()
    }
}

impl ToSchema for AuditType {}

/// Who did something.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditActor {
    /// `shell`: whoever reaches the database, with `lathe key`. `system`: the server itself, which deletes what has expired.
    #[schema(value_type = AuditActorType)]
    r#type: String,
    /// The API key, by its id.
    key_id: Option<String>,
}

#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[allow(dead_code, reason = "names what the column holds")]
pub enum AuditActorType {
    ApiKey,
    Shell,
    System,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "audit_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "audit_log", "type": "file.deleted", "effective_at": 1767225600,
    "project_id": "proj_default", "resource_id": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "actor": {"type": "api_key", "key_id": "key_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"}}))]
pub struct AuditEntry {
    #[schema(examples("audit_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("audit_log"))]
    object: &'static str,
    #[schema(value_type = AuditType)]
    r#type: String,
    /// Unix seconds.
    effective_at: i64,
    /// The project that the resource belongs to.
    project_id: String,
    /// It may be gone.
    resource_id: String,
    actor: AuditActor,
}

struct AuditRow {
    id: String,
    r#type: String,
    resource_id: String,
    project_id: String,
    actor: String,
    key_id: Option<String>,
    created_at: OffsetDateTime,
}

impl From<AuditRow> for AuditEntry {
    fn from(row: AuditRow) -> AuditEntry {
        AuditEntry {
            id: row.id,
            object: "audit_log",
            r#type: row.r#type,
            effective_at: row.created_at.unix_timestamp(),
            project_id: row.project_id,
            resource_id: row.resource_id,
            actor: AuditActor { r#type: row.actor, key_id: row.key_id },
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListAuditLog {
    /// The id of the last item of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    /// Only what was done like this.
    #[param(inline)]
    r#type: Option<AuditType>,
    /// Only what belongs to this project.
    project_id: Option<String>,
    /// Only what was done with this key.
    key_id: Option<String>,
    /// Only what was done to this.
    resource_id: Option<String>,
}

/// List what was done, and by whom
///
/// Creations, deletions, cancellations and revocations of all projects, each once, and each pause, resumption, change of
/// quotas and of the log filter. Kept for a year unless configured otherwise.
#[utoipa::path(get, path = "/v1/audit", operation_id = "list_audit_log", tag = "operating", params(ListAuditLog), responses((status = 200, description = "A page", body = List<AuditEntry>)))]
async fn list_audit_log(
    State(state): State<AppState>,
    _: Admin,
    Query(query): Query<ListAuditLog>,
) -> Result<Json<List<AuditEntry>>, ApiError> {
    let page = Page::asked(query.limit.unwrap_or(20), query.order, query.after, async |id| {
        sqlx::query_scalar!("SELECT created_at FROM audit_log WHERE id = $1", id).fetch_optional(&state.db).await
    })
    .await?;
    let rows = fetch_page!(
        AuditRow,
        &state.db,
        &page,
        "SELECT id, type, resource_id, project_id, actor, key_id, created_at FROM audit_log
         WHERE ($4::text IS NULL OR type = $4) AND ($5::text IS NULL OR project_id = $5)
           AND ($6::text IS NULL OR key_id = $6) AND ($7::text IS NULL OR resource_id = $7)",
        query.r#type.map(|AuditType(deed)| deed.as_str()),
        query.project_id,
        query.key_id,
        query.resource_id,
    )?;
    Ok(Json(List::of(rows.into_iter().map(AuditEntry::from).collect(), &page, |entry| &entry.id)))
}
