//! Compiles the hooks of the tch adapter, which are C++. Without the feature `tch` there is nothing to do.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(all(feature = "tch", not(feature = "tch-doc-only")))]
    compile_hooks();
}

#[cfg(all(feature = "tch", not(feature = "tch-doc-only")))]
fn compile_hooks() {
    use std::env;
    use std::path::PathBuf;

    // torch-sys has found libtorch, and says where its libraries are; the headers lie beside them, unless it was told otherwise.
    let libraries = env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is");
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    let home = env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(libraries).parent()?.to_owned()));
    let include = home.expect("libtorch's libraries are in a folder").join("include");
    println!("cargo::rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    println!("cargo::rerun-if-changed=src/tch/hooks.cpp");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        // The headers are not ours.
        .warnings(false)
        .file("src/tch/hooks.cpp")
        .compile("paceline_tch_hooks");
}
