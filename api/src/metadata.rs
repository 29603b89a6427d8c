//! `metadata`: what a client likes to remember with whatever it creates.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, Schema, Type},
    },
};

/// Up to 16 pairs of strings: keys of at most 64 characters, values of at most 512.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata(pub BTreeMap<String, String>);

impl ToSchema for Metadata {}

impl PartialSchema for Metadata {
    fn schema() -> RefOr<Schema> {
        let text = |longest| ObjectBuilder::new().schema_type(Type::String).max_length(Some(longest)).build();
        let mut object = ObjectBuilder::new()
            .description(Some("Up to 16 pairs of strings."))
            .property_names(Some(Schema::Object(text(64))))
            .additional_properties(Some(Schema::Object(text(512))))
            .examples([serde_json::json!({"owner": "speech"})])
            .build();
        object.max_properties = Some(16);
        object.into()
    }
}

impl Metadata {
    /// As stored in a row.
    pub fn from_row(stored: serde_json::Value) -> Metadata {
        serde_json::from_value(stored).unwrap_or_default()
    }

    pub fn to_row(&self) -> serde_json::Value {
        serde_json::json!(self.0)
    }
}
