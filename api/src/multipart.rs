//! A multipart form with one file, streamed into the artifact store in constant memory.
//!
//! The other fields are short texts and may come before or after the file. Whatever is wrong with
//! the form, nothing of the file remains: an [`Upload`] that is dropped removes its temporary file.
//!
//! Two forms with the same fields are the same, whatever their boundary and order; a [`Fingerprint`]
//! tells.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use axum::{
    body::Body,
    extract::{
        FromRequest, Multipart, Request,
        multipart::{Field, MultipartError, MultipartRejection},
    },
    http::{HeaderMap, StatusCode},
};
use futures_util::{StreamExt, future::ready, stream};
use lathe_jobs::artifacts::Upload;
use sha2::{Digest, Sha256};

use crate::{parse, problem::ApiError, state::AppState};

/// Bytes of a text field, and how many fields a form may have.
const TEXT_LIMIT: usize = 64 << 10;
const FIELDS_LIMIT: usize = 64;

/// Bytes of a form besides its file.
const OTHERS_LIMIT: u64 = (TEXT_LIMIT * FIELDS_LIMIT) as u64;

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

/// Where [`receive`] leaves a hash of the fields of a whole form, for whoever put this into the request's
/// extensions.
#[derive(Clone, Debug, Default)]
pub struct Fingerprint(Arc<OnceLock<String>>);

impl Fingerprint {
    /// Nothing before the form has wholly arrived.
    pub fn get(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}

/// Hashes of a form's fields, in any order.
#[derive(Default)]
struct Fields(Vec<[u8; 32]>);

impl Fields {
    fn add(&mut self, name: &str, filename: Option<&str>, content: Sha256) {
        let mut field = Sha256::new();
        for part in [name.as_bytes(), filename.unwrap_or_default().as_bytes()] {
            field.update((part.len() as u64).to_le_bytes());
            field.update(part);
        }
        field.update(content.finalize());
        self.0.push(field.finalize().into());
    }

    fn finish(mut self) -> String {
        self.0.sort_unstable();
        hex::encode(Sha256::digest(self.0.concat()))
    }
}

/// The fingerprint of a form whose first copy has been answered. Nothing of it is kept.
pub async fn fingerprint(state: &AppState, request: Request) -> Result<String, ApiError> {
    let limit = state.config.file_limit.saturating_add(OTHERS_LIMIT);
    let (mut form, mut fields, mut bytes) = (parts(request, state).await?, Fields::default(), 0);
    while let Some(mut field) = form.next_field().await? {
        let (name, filename) = (field.name().unwrap_or_default().to_owned(), field.file_name().map(str::to_owned));
        let mut content = Sha256::new();
        while let Some(chunk) = field.chunk().await? {
            bytes += chunk.len() as u64;
            if bytes > limit {
                return Err(ApiError::too_large("The file", state.config.file_limit));
            }
            content.update(&chunk);
        }
        fields.add(&name, filename.as_deref(), content);
    }
    Ok(fields.finish())
}

/// What the file of a form has at the least, where the form's length is announced.
pub fn least_bytes(headers: &HeaderMap) -> Option<i64> {
    let least = parse::announced(headers)?.checked_sub(OTHERS_LIMIT)?;
    Some(i64::try_from(least).unwrap_or(i64::MAX))
}

/// Refuses a form that is announced to be larger than it may be, or than the disk has room for.
async fn admit(state: &AppState, headers: &HeaderMap, limit: u64) -> Result<(), ApiError> {
    let Some(announced) = parse::announced(headers) else { return Ok(()) };
    if announced > limit.saturating_add(OTHERS_LIMIT) {
        return Err(ApiError::too_large("The file", limit));
    }
    let free = state.free_bytes().await.map_err(ApiError::internal)?;
    if announced > free { Err(ApiError::insufficient_storage()) } else { Ok(()) }
}

/// The form's parts. The parser takes a form for incomplete that comes whole, with its end, between its first look at the
/// body and its second, so here the end always comes one look later.
async fn parts(request: Request, state: &AppState) -> Result<Multipart, MultipartRejection> {
    let end = stream::once(tokio::task::yield_now()).filter_map(|()| ready(None));
    let request = request.map(|body| Body::from_stream(body.into_data_stream().chain(end)));
    Multipart::from_request(request, state).await
}

/// Reads the form. 400 for a bad one, 413 over the limit, 507 without room; both of these before the body
/// is read where its length is announced.
pub async fn receive(state: &AppState, request: Request, expected: Expected<'_>) -> Result<Received, ApiError> {
    admit(state, request.headers(), expected.limit).await?;
    let fingerprint = request.extensions().get::<Fingerprint>().cloned();
    let mut fields = Fields::default();
    let mut form = parts(request, state).await?;
    let mut file: Option<(Upload, String)> = None;
    let mut texts = BTreeMap::new();
    while let Some(mut field) = form.next_field().await? {
        let name = field.name().unwrap_or_default().to_owned();
        if name == expected.file_field {
            if file.is_some() {
                return Err(ApiError::bad_request(name, "The form must hold one file, not several."));
            }
            let stated = field.file_name().map(str::to_owned);
            let (mut upload, mut content) = (state.artifacts.create(expected.key).await?, Sha256::new());
            while let Some(chunk) = field.chunk().await? {
                if upload.bytes() + chunk.len() as u64 > expected.limit {
                    return Err(ApiError::too_large("The file", expected.limit).with_param(name));
                }
                upload.write(&chunk).await?;
                if fingerprint.is_some() {
                    content.update(&chunk);
                }
            }
            fields.add(&name, stated.as_deref(), content);
            file = Some((upload, plain_filename(stated.as_deref().unwrap_or("upload"))));
        } else if expected.texts.contains(&name.as_str()) {
            let filename = field.file_name().map(str::to_owned);
            let text = read_text(field, &name).await?;
            fields.add(&name, filename.as_deref(), Sha256::new_with_prefix(&text));
            if texts.insert(name.clone(), text).is_some() {
                return Err(ApiError::bad_request(&name, format!("The form's field `{name}` is given twice.")));
            }
        } else {
            let known = expected.texts.iter().copied().chain([expected.file_field]).collect::<Vec<_>>().join(", ");
            return Err(ApiError::bad_request(&name, format!("The form has no field `{name}`; known are: {known}.")));
        }
    }
    if let Some(Fingerprint(slot)) = fingerprint {
        slot.get_or_init(|| fields.finish());
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
pub fn plain_filename(name: &str) -> String {
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
    use lathe_jobs::artifacts::Artifacts;
    use proptest::prelude::*;

    use super::*;
    use crate::state::ApiConfig;

    const LIMIT: u64 = 300;

    /// A state whose database is not there: forms need none.
    fn state(root: &std::path::Path) -> AppState {
        let db = sqlx::PgPool::connect_lazy("postgres://nobody@127.0.0.1:1/none").unwrap();
        AppState::new(db, Artifacts::open(root).unwrap(), ApiConfig::default())
    }

    /// Bytes of a form with the boundary `b`, more or less.
    fn form() -> impl Strategy<Value = Vec<u8>> {
        let pieces = [
            "--b\r\n",
            "--b--\r\n",
            "--b",
            "\r\n",
            "\r\n\r\n",
            "\n",
            "\r",
            "--",
            "b",
            "Content-Disposition: form-data",
            "; name=\"file\"",
            "; name=\"purpose\"",
            "; name=file",
            "; filename=\"a/b.txt\"",
            "; filename*=UTF-8''%ff",
            "; name=\"\"",
            "Content-Type: text/plain",
            "Content-Length: 99999999999999999999",
            "X: y",
            ": ",
            "text",
            "batch",
            "\u{0}",
            "é",
            "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nabc\r\n",
            "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n",
        ];
        let piece = prop_oneof![
            8 => prop::sample::select(pieces.to_vec()).prop_map(|text| text.as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 1..8),
            1 => (1usize..500).prop_map(|length| vec![b'x'; length]),
        ];
        prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_form_ends_well(bytes in form(), chunk in 1usize..600, whole in any::<bool>()) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let root = tempfile::tempdir().unwrap();
            let received = runtime.block_on(async {
                let state = state(root.path());
                let chunks: Vec<_> = bytes.chunks(chunk).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect();
                let body = if whole { Body::from(bytes) } else { Body::from_stream(futures_util::stream::iter(chunks)) };
                let request = Request::builder().header("content-type", "multipart/form-data; boundary=b").body(body).unwrap();
                let expected = Expected { file_field: "file", texts: &["purpose"], key: "files/one", limit: LIMIT };
                receive(&state, request, expected).await
            });
            match received {
                Ok(form) => {
                    prop_assert!((1..=LIMIT).contains(&form.upload.bytes()));
                    prop_assert!(!form.filename.is_empty() && !form.filename.contains(['/', '\\']));
                }
                Err(refusal) => {
                    prop_assert!([400, 413].contains(&refusal.status.as_u16()), "{refusal:?}");
                    prop_assert!(!refusal.body.error.message.is_empty());
                }
            }
            // Neither of the two published anything, and what was dropped has removed itself.
            prop_assert_eq!(std::fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);
            prop_assert!(!root.path().join("files").exists());
        }
    }

    #[tokio::test]
    async fn a_form_that_comes_between_two_looks_at_the_body_is_whole() {
        const FORM: &str = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nabc\r\n--b--\r\n";
        let root = tempfile::tempdir().unwrap();
        let mut looks = 0;
        let body = stream::poll_fn(move |context| {
            looks += 1;
            match looks {
                1 => {
                    context.waker().wake_by_ref();
                    std::task::Poll::Pending
                }
                2 => std::task::Poll::Ready(Some(Ok::<_, std::io::Error>(FORM))),
                _ => std::task::Poll::Ready(None),
            }
        });
        let request = Request::builder().header("content-type", "multipart/form-data; boundary=b");
        let request = request.body(Body::from_stream(body)).unwrap();
        let expected = Expected { file_field: "file", texts: &[], key: "files/one", limit: LIMIT };
        assert_eq!(receive(&state(root.path()), request, expected).await.unwrap().upload.bytes(), 3);
    }

    #[test]
    fn a_fingerprint_is_of_names_and_contents_in_any_order() {
        let of = |fields: &[(&str, Option<&str>, &str)]| {
            let mut hashes = Fields::default();
            fields.iter().for_each(|(name, filename, text)| hashes.add(name, *filename, Sha256::new_with_prefix(text)));
            hashes.finish()
        };
        let first = of(&[("file", Some("a.txt"), "x"), ("purpose", None, "batch")]);
        assert_eq!(of(&[("purpose", None, "batch"), ("file", Some("a.txt"), "x")]), first);
        for other in [
            [("file", Some("a.txt"), "y"), ("purpose", None, "batch")],
            [("file", Some("b.txt"), "x"), ("purpose", None, "batch")],
            [("file", Some("a.txt"), "x"), ("purpose", None, "evals")],
        ] {
            assert_ne!(of(&other), first);
        }
    }

    #[test]
    fn filenames_lose_their_folders() {
        assert_eq!(plain_filename("../../etc/passwd"), "passwd");
        assert_eq!(plain_filename(r"C:\data\rows.jsonl"), "rows.jsonl");
        assert_eq!(plain_filename("a\u{0}b\n"), "ab");
        assert_eq!(plain_filename("dir/"), "upload");
        assert_eq!(plain_filename(&"é".repeat(300)).chars().count(), 255);
    }
}
