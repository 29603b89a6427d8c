//! Which PostgreSQL runs the cluster.

use std::{
    env, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    PostgresError, doing,
    home::{Home, LIBRARY},
};

/// The oldest major version that Lathe works with.
const OLDEST: u32 = 15;

/// The folder of setup's copy, below the cache.
const CACHED: &str = "postgres-18";

#[derive(Debug)]
pub struct Binaries {
    /// Holds `postgres` and `initdb`.
    pub folder: PathBuf,
}

impl Binaries {
    /// The version that made the cluster where there is one, else the first that is new enough; copied
    /// to where the cluster's user can reach it, if need be.
    pub fn find(made_by: Option<u32>, home: &Home) -> Result<Binaries, PostgresError> {
        let found: Vec<(PathBuf, u32)> =
            candidates().into_iter().filter_map(|folder| Some((folder.clone(), version(&folder)?))).collect();
        let usable = found.iter().find(|(_, major)| made_by.map_or(*major >= OLDEST, |made_by| *major == made_by));
        let (folder, major) = match (usable, made_by) {
            (Some(usable), _) => usable,
            (None, Some(made_by)) if !found.is_empty() => {
                let mut versions: Vec<String> = found.iter().map(|(_, major)| major.to_string()).collect();
                versions.dedup();
                return Err(PostgresError::OtherVersion { cluster: home.cluster(), made_by, found: versions.join(", ") });
            }
            (None, _) => return Err(PostgresError::NotFound(cache().join(CACHED).join("bin"))),
        };
        let folder = folder.canonicalize().map_err(doing(format!("finding {}", folder.display())))?;
        match home.user() {
            Some(user) if !user.reaches(&folder.join("postgres")) => Ok(Binaries { folder: copy(&folder, *major)? }),
            _ => Ok(Binaries { folder }),
        }
    }
}

fn cache() -> PathBuf {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || named("HOME").unwrap_or_default().join(".cache");
    named("LATHE_CACHE").unwrap_or_else(|| named("XDG_CACHE_HOME").unwrap_or_else(home).join("lathe"))
}

/// Folders to look in, the likeliest first.
fn candidates() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = env::var_os("LATHE_POSTGRES_BIN").map(PathBuf::from).into_iter().collect();
    for folder in env::split_paths(&env::var_os("PATH").unwrap_or_default()) {
        if let Ok(program) = folder.join("postgres").canonicalize() {
            folders.extend(program.parent().map(Path::to_owned));
        }
    }
    let mut packaged: Vec<PathBuf> =
        fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    packaged.sort_by_key(|folder| std::cmp::Reverse(folder.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok())));
    folders.extend(packaged.into_iter().map(|folder| folder.join("bin")));
    folders.push(cache().join(CACHED).join("bin"));
    folders
}

/// The major version of the server in `folder`, if there is one with all that is needed.
fn version(folder: &Path) -> Option<u32> {
    if !folder.join("initdb").exists() {
        return None;
    }
    // "postgres (PostgreSQL) 16.2 (Debian 16.2-1)"
    let output = Command::new(folder.join("postgres")).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace().find_map(|word| word.split('.').next()?.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok())
}

/// A copy of the whole installation that everyone may read, made once.
fn copy(folder: &Path, major: u32) -> Result<PathBuf, PostgresError> {
    let (source, target) = (folder.parent().unwrap_or(folder), Path::new(LIBRARY).join(format!("postgres-{major}")));
    let staged = target.with_extension(format!("new-{}", std::process::id()));
    let copied = (|| {
        if target.join("bin/postgres").exists() {
            return Ok(());
        }
        fs::create_dir_all(LIBRARY)?;
        fs::set_permissions(LIBRARY, fs::Permissions::from_mode(0o711))?;
        copy_tree(source, &staged)?;
        match fs::rename(&staged, &target) {
            // Another server's copy came first.
            Err(_) if target.join("bin/postgres").exists() => fs::remove_dir_all(&staged),
            renamed => renamed,
        }
    })();
    copied.map_err(doing(format!("copying PostgreSQL to {}", target.display())))?;
    tracing::info!(from = %folder.display(), to = %target.display(), "the database's user cannot reach PostgreSQL, so a copy is used");
    Ok(target.join("bin"))
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
            let executable = fs::metadata(&to)?.permissions().mode() & 0o100 != 0;
            fs::set_permissions(&to, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
        }
    }
    Ok(())
}
