//! Gives this crate's binaries the run path to libtorch (see `model/build.rs`), and builds what `src/pretence.rs` loads
//! into stacks.

use std::{env, path::Path};

fn main() {
    println!("cargo:rerun-if-env-changed=DEP_LATHE_SHIM_LIBDIR");
    if let Ok(libdir) = env::var("DEP_LATHE_SHIM_LIBDIR") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libdir}");
    }
    let source = "src/pretence.c";
    println!("cargo:rerun-if-changed={source}");
    let library = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("pretence.so");
    let mut compile = cc::Build::new().get_compiler().to_command();
    compile.args(["-shared", "-fPIC", "-O2", "-o"]).arg(&library).arg(source);
    assert!(compile.status().expect("a C compiler runs").success(), "{source} does not compile");
    println!("cargo:rustc-env=LATHE_TEST_PRETENCE={}", library.display());
}
