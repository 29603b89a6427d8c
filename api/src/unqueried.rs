//! Routes that take no query refuse every one, so that a misspelt or misplaced parameter is not ignored.

use std::{collections::HashSet, sync::Arc};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{Method, Uri},
    middleware::Next,
    response::Response,
};
use utoipa::openapi::{OpenApi, RefOr, path::ParameterIn};

use crate::{parse, problem::ApiError};

/// The operations that take a query, by method and path.
pub fn queried(document: &OpenApi) -> HashSet<(Method, String)> {
    let mut queried = HashSet::new();
    for (path, item) in &document.paths.paths {
        let operations = [
            (Method::GET, &item.get),
            (Method::POST, &item.post),
            (Method::PUT, &item.put),
            (Method::PATCH, &item.patch),
            (Method::DELETE, &item.delete),
        ];
        for (method, operation) in operations {
            let mut parameters = operation.iter().flat_map(|operation| operation.parameters.iter().flatten());
            if parameters.any(|parameter| matches!(parameter, RefOr::T(one) if one.parameter_in == ParameterIn::Query)) {
                queried.insert((method, path.clone()));
            }
        }
    }
    queried
}

/// Middleware: 400 for a query where the document has none. Those in `queried` read theirs with
/// [`parse::Query`].
pub async fn refuse(
    State(queried): State<Arc<HashSet<(Method, String)>>>,
    route: MatchedPath,
    method: Method,
    uri: Uri,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let method = if method == Method::HEAD { Method::GET } else { method };
    if !queried.contains(&(method, route.as_str().to_owned())) {
        parse::refuse_query(&uri)?;
    }
    Ok(next.run(request).await)
}
