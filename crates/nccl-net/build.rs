//! How the library and the program are linked.

fn main() {
    // NCCL unloads its plugins when a communicator ends; the I/O thread goes on, so its code must stay.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // As a program does that is its own plugin.
    for table in ["ncclNetPlugin_v8", "ncclNetPlugin_v11"] {
        println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol={table}");
    }
}
