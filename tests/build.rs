//! Gives this crate's binaries the run path to libtorch (see `model/build.rs`).

fn main() {
    println!("cargo:rerun-if-env-changed=DEP_LATHE_SHIM_LIBDIR");
    if let Ok(libdir) = std::env::var("DEP_LATHE_SHIM_LIBDIR") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libdir}");
    }
}
