//! The proof that a runner reads what the api wrote.

use lathe_jobs::{
    artifacts::Artifacts,
    store_id::{self, StoreError},
};
use sqlx::PgPool;

fn store() -> (tempfile::TempDir, Artifacts) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let artifacts = Artifacts::open(folder.path()).expect("it is writable");
    (folder, artifacts)
}

#[sqlx::test(migrations = "../migrations")]
async fn only_the_api_s_folder_is_accepted(db: PgPool) {
    let mut conn = db.acquire().await.expect("the database is there");
    let ((_one, api), (_other, elsewhere)) = (store(), store());
    let early = store_id::refusal(&mut conn, &api).await.expect("the database is there").expect("no api was there");
    assert!(early.may_pass && early.sentence.contains("start `lathe api`"), "{early:?}");
    store_id::write(&mut conn, &api).await.expect("it is writable");
    store_id::write(&mut conn, &api).await.expect("twice is once");
    assert_eq!(store_id::refusal(&mut conn, &api).await.expect("the database is there"), None);
    let missing = store_id::refusal(&mut conn, &elsewhere).await.expect("the database is there").expect("it is another folder");
    assert!(missing.sentence.contains(&elsewhere.root().display().to_string()), "{missing:?}");
    std::fs::write(elsewhere.root().join("store_id"), "store_other").expect("it is writable");
    let other = store_id::refusal(&mut conn, &elsewhere).await.expect("the database is there").expect("it is another's");
    assert!(!other.may_pass && other.sentence.contains("store_other"), "{other:?}");
}

#[sqlx::test(migrations = "../migrations")]
async fn an_api_takes_a_restored_folder_and_no_wrong_one(db: PgPool) {
    let mut conn = db.acquire().await.expect("the database is there");
    let ((_one, first), (_other, restored), (_empty, empty)) = (store(), store(), store());
    store_id::write(&mut conn, &first).await.expect("it is writable");
    // The artifacts of a backup are copied before its rows are restored.
    std::fs::write(restored.root().join("store_id"), "store_restored").expect("it is writable");
    store_id::write(&mut conn, &restored).await.expect("this database has stored nothing yet");
    assert_eq!(store_id::refusal(&mut conn, &restored).await.expect("the database is there"), None);
    for statement in [
        "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
        "INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, artifact) VALUES ('file-1', 'proj_1', 'a', 'user_data', 1, '0', 'files/file-1')",
    ] {
        sqlx::query(statement).execute(&db).await.expect("an empty database");
    }
    assert!(matches!(store_id::write(&mut conn, &first).await, Err(StoreError::Other { .. })));
    assert!(matches!(store_id::write(&mut conn, &empty).await, Err(StoreError::Lacks { .. })));
}
