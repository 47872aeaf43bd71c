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

    // torch-sys has found libtorch, and says where its libraries are. Its headers are where torch-sys looks for them.
    let libraries = env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is");
    let variable = |name| {
        println!("cargo::rerun-if-env-changed={name}");
        env::var_os(name).map(PathBuf::from)
    };
    let asked = ["LIBTORCH_INCLUDE", "LIBTORCH"].map(variable).into_iter().flatten().next();
    let home = asked.filter(|_| variable("LIBTORCH_USE_PYTORCH").is_none());
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
