//! The closed sets of the other crates, as requests and answers name them.
//!
//! Those crates know nothing of OpenAPI. A name is one of their enums with a schema that lists its variants,
//! so a set is written down once and a new variant is in the document by itself.

use serde::Serialize;
use utoipa::openapi::{
    RefOr,
    schema::{ObjectBuilder, Schema, Type},
};

/// Wraps enums that have `ALL`: `Name(Enum)`, in JSON what the enum is. Its comment is its description.
macro_rules! names {
    ($($(#[doc = $doc:literal])* $name:ident($of:ty),)+) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
        #[serde(transparent)]
        pub struct $name(pub $of);

        impl From<$of> for $name {
            fn from(of: $of) -> $name {
                $name(of)
            }
        }

        impl utoipa::ToSchema for $name {}

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                crate::names::schema(<$of>::ALL, concat!($($doc),*))
            }
        }
    )+};
}
pub(crate) use names;

pub(crate) fn schema(all: &[impl Serialize], comment: &str) -> RefOr<Schema> {
    let names: Vec<_> = all.iter().map(|one| serde_json::json!(one)).collect();
    let comment = comment.trim();
    let description = (!comment.is_empty()).then_some(comment);
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).description(description).into()
}
