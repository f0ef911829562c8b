// Whose products of the kernel's sizes are fastest on one thread? Ours against Eigen, oneDNN, BLIS and OpenBLAS, those
// that are installed (Debian: libeigen3-dev libdnnl-dev libblis-dev libopenblas-dev). From the repository's root:
//
//   g++ -O3 -march=native -std=c++17 -I. -isystem .deps/usr/include -I/usr/include/eigen3 benchmarks/products.cc -o
//   products
//       -ldnnl -l:libblis.so.4 -l:libopenblas.so.0
//   OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 ./products
//
// BLIS and OpenBLAS are opened at run time, as both define sgemm_. Each figure is the best of 7 rounds of 1 GFLOP, in
// GFLOP/s.
#define HWY_DISABLED_TARGETS (~(HWY_AVX3 | HWY_AVX2 | HWY_NEON_WITHOUT_AES | HWY_EMU128 | HWY_SCALAR))

#include <dlfcn.h>
#include <dnnl.h>

#include <Eigen/Dense>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "plugins/kernels/neural_memory.h"
#include "plugins/kernels/product-inl.h"

namespace {

using namespace titans::kernels::HWY_NAMESPACE;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

Sgemm open_sgemm(const char* library) {
  void* handle = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  return handle == nullptr ? nullptr : reinterpret_cast<Sgemm>(::dlsym(handle, "sgemm_"));
}

double gflops(double flop, const std::function<void()>& product) {
  const int repeats = static_cast<int>(1e9 / flop) + 1;
  double best = 1e9;
  for (int round = 0; round < 7; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) product();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return flop * repeats / best * 1e-9;
}

void measure(int m, int k, int n) {
  const auto rows = static_cast<std::size_t>(m), inner = static_cast<std::size_t>(k),
             columns = static_cast<std::size_t>(n);
  Matrix a = Matrix::Random(m, k), b = Matrix::Random(k, n), c(m, n);
  const Matrix exact = (a.cast<double>() * b.cast<double>()).cast<float>();
  const double flop = 2.0 * m * n * k;
  const float one = 1.0F, zero = 0.0F;
  // Column-major libraries compute the transpose.
  const auto column_major = [&](Sgemm sgemm) {
    return [&, sgemm] { sgemm("N", "N", &n, &m, &k, &one, b.data(), &n, a.data(), &k, &zero, c.data(), &n); };
  };
  std::vector<std::pair<std::string, std::function<void()>>> all;
  all.emplace_back("ours", [&] {
    const Product products[] = {{a.data(), inner, b.data(), columns, inner}};
    multiply<Part::kAll>(products, rows, columns, 0, [&](Vector v, std::size_t i, std::size_t j, std::size_t count) {
      store(v, c.data() + i * columns + j, count);
    });
  });
  all.emplace_back("Eigen", [&] { c.noalias() = a * b; });
  all.emplace_back("oneDNN", [&] { dnnl_sgemm('N', 'N', m, n, k, 1.0F, a.data(), k, b.data(), n, 0.0F, c.data(), n); });
  if (const Sgemm blis = open_sgemm("libblis.so.4")) all.emplace_back("BLIS", column_major(blis));
  if (const Sgemm openblas = open_sgemm("libopenblas.so.0")) all.emplace_back("OpenBLAS", column_major(openblas));
  std::printf("%4d x %4d x %4d", m, k, n);
  for (const auto& [name, product] : all) {
    c.setZero();
    product();
    if ((c - exact).cwiseAbs().maxCoeff() > 1e-3F) {
      std::printf("  %s wrong", name.c_str());
    } else {
      std::printf("  %s %.1f", name.c_str(), gflops(flop, product));
    }
  }
  std::printf("\n");
}

}  // namespace

int main() {
  measure(64, 64, 64);
  measure(64, 64, 256);
  measure(64, 256, 64);
  measure(1024, 1024, 1024);
  return 0;
}
