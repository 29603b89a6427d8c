//! Compiles the C++ shim over libtorch and links libtorch's CPU half.
//!
//! The CUDA half is loaded at run time where it is found, so one binary serves both.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=cpp");
    let libtorch = PathBuf::from(
        env::var("LIBTORCH")
            .unwrap_or_else(|_| panic!("LIBTORCH is not set: build with `make build`, or run `eval \"$(make -s env)\"` first")),
    );
    let include = libtorch.join("include");
    let lib = libtorch.join("lib");

    // `at::parallel_for` is compiled into whoever calls it, and without OpenMP it is a plain loop.
    let threads = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    let mut shim = cc::Build::new();
    if threads {
        shim.flag("-fopenmp");
    }
    shim.cpp(true)
        .std("c++20")
        .files(["cpp/shim.cpp", "cpp/attend.cpp", "cpp/packed.cpp"])
        .include("cpp")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .opt_level(2)
        .warnings(false)
        .compile("lathe_shim");

    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .file("cpp/c10d.cpp")
        .include("cpp/stub")
        .include("cpp")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .opt_level(2)
        .warnings(false)
        .compile("lathe_c10d");

    let kernels = |name: &str, flags: &[&str]| {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").file("cpp/attention.cpp").define("LATHE_KERNELS", name).opt_level(3);
        flags.iter().for_each(|flag| _ = build.flag(flag));
        build.warnings(false).flag_if_supported("-Wno-psabi").compile(&format!("lathe_{name}"));
    };
    kernels("attention_baseline", &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
        kernels("attention_avx2", &["-mavx2", "-mfma"]);
        let avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"];
        kernels("attention_avx512", &avx512);
        let mut rows = cc::Build::new();
        rows.cpp(true).std("c++20").file("cpp/row_product.cpp").opt_level(3);
        avx512.iter().chain(&["-mavx512bf16"]).for_each(|flag| _ = rows.flag(flag));
        rows.warnings(false).compile("lathe_row_product");
    }

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    if threads {
        // Found at run time beside libtorch, which comes with it, so that both have the same threads.
        println!("cargo:rustc-link-lib=gomp");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    // Crates that link a binary repeat the run path: link arguments do not travel to dependants.
    println!("cargo:libdir={}", lib.display());
}
