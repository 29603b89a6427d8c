//! A multipart form with one file, streamed into the artifact store in constant memory.
//!
//! The other fields are short texts and may come before or after the file. Whatever is wrong with
//! the form, nothing of the file remains: an [`Upload`] that is dropped removes its temporary file.

use std::collections::BTreeMap;

use axum::{
    extract::{
        FromRequest, Multipart, Request,
        multipart::{Field, MultipartError, MultipartRejection},
    },
    http::{StatusCode, header},
};
use lathe_jobs::artifacts::Upload;

use crate::{parse, problem::ApiError, state::AppState};

/// Bytes of a text field, and how many fields a form may have.
const TEXT_LIMIT: usize = 64 << 10;
const FIELDS_LIMIT: usize = 64;

/// What a form must look like.
pub struct Expected<'a> {
    /// The name of the field with the file.
    pub file_field: &'static str,
    /// Names of the texts that may be there.
    pub texts: &'a [&'static str],
    /// Where the file will lie once it is finished.
    pub key: &'a str,
    /// Bytes that the file may have.
    pub limit: u64,
}

/// A form that has wholly arrived; its file is not published before [`Upload::finish`].
pub struct Received {
    pub upload: Upload,
    pub filename: String,
    pub texts: BTreeMap<String, String>,
}

/// Reads the form. 400 for a bad one, 413 over the limit, 507 without room.
pub async fn receive(state: &AppState, request: Request, expected: Expected<'_>) -> Result<Received, ApiError> {
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok())
        .and_then(|length| length.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > expected.limit.saturating_add((FIELDS_LIMIT * TEXT_LIMIT) as u64)) {
        return Err(ApiError::too_large("The file", expected.limit));
    }
    let mut form = Multipart::from_request(request, state).await?;
    let mut file: Option<(Upload, String)> = None;
    let mut texts = BTreeMap::new();
    while let Some(mut field) = form.next_field().await? {
        let name = field.name().unwrap_or_default().to_owned();
        if name == expected.file_field {
            if file.is_some() {
                return Err(ApiError::bad_request(name, "The form must hold one file, not several."));
            }
            let filename = plain_filename(field.file_name().unwrap_or("upload"));
            let mut upload = state.artifacts.create(expected.key).await?;
            while let Some(chunk) = field.chunk().await? {
                if upload.bytes() + chunk.len() as u64 > expected.limit {
                    return Err(ApiError::too_large("The file", expected.limit).with_param(name));
                }
                upload.write(&chunk).await?;
            }
            file = Some((upload, filename));
        } else if expected.texts.contains(&name.as_str()) {
            let text = read_text(field, &name).await?;
            if texts.insert(name.clone(), text).is_some() {
                return Err(ApiError::bad_request(&name, format!("The form's field `{name}` is given twice.")));
            }
        } else {
            let known = expected.texts.iter().copied().chain([expected.file_field]).collect::<Vec<_>>().join(", ");
            return Err(ApiError::bad_request(&name, format!("The form has no field `{name}`; known are: {known}.")));
        }
    }
    match file {
        Some((upload, _)) if upload.bytes() == 0 => Err(ApiError::bad_request(expected.file_field, "The file is empty.")),
        Some((upload, filename)) => Ok(Received { upload, filename, texts }),
        None => Err(ApiError::bad_request(
            expected.file_field,
            format!("The form must hold a file under the name `{}`.", expected.file_field),
        )),
    }
}

async fn read_text(mut field: Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > TEXT_LIMIT {
            return Err(ApiError::bad_request(name, format!("The form's field `{name}` may have at most {TEXT_LIMIT} bytes.")));
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(ApiError::bad_request(name, format!("The form's field `{name}` must be UTF-8 text without U+0000."))),
    }
}

/// The last part of a path, without control characters, at most 255 characters of it.
fn plain_filename(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let plain: String = last.chars().filter(|c| !c.is_control()).take(255).collect();
    if plain.is_empty() { "upload".to_owned() } else { plain }
}

impl From<MultipartRejection> for ApiError {
    fn from(_: MultipartRejection) -> ApiError {
        ApiError::unsupported_media_type("The body must be a form under `Content-Type: multipart/form-data` with a boundary.")
    }
}

impl From<MultipartError> for ApiError {
    fn from(error: MultipartError) -> ApiError {
        let broken = parse::broken_body(&error);
        if broken.status == StatusCode::REQUEST_TIMEOUT {
            return broken;
        }
        ApiError::bad_request("", format!("The form cannot be read: {}.", error.body_text().trim_end_matches('.')))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filenames_lose_their_folders() {
        assert_eq!(plain_filename("../../etc/passwd"), "passwd");
        assert_eq!(plain_filename(r"C:\data\rows.jsonl"), "rows.jsonl");
        assert_eq!(plain_filename("a\u{0}b\n"), "ab");
        assert_eq!(plain_filename("dir/"), "upload");
        assert_eq!(plain_filename(&"é".repeat(300)).chars().count(), 255);
    }
}
