// The C++ shim over libtorch: what tch does not offer. Every function is `extern "C"`, catches every
// exception, and reports it through `lathe_last_error`.
#include <ATen/ATen.h>

extern "C" {
int lathe_shim_abi() { return 1; }
}
