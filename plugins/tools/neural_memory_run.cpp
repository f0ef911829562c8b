// Runs the bare kernel over calls from a file, for tests against outside oracles and for timing without a runtime.
//
//   neural_memory_run CASE.safetensors OUT.bin [--target NAME] [--threads N] [--two-buffers] [--before]
//                     [--time REPEATS]
//   neural_memory_run --list-targets
//
// CASE is as case_file.h says. The state goes from call to call, in one buffer or, with --two-buffers, from one of two
// to the other. OUT receives float32: each call's y and, after an update, its stats, with --before also that output; at
// last the state. With --time all calls are repeated, the state flowing on, and stdout has the nanoseconds of each.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/tools/case_file.h"
#include "plugins/tools/spin_pool.h"

namespace {

using nlohmann::json;
using namespace titans::kernels;

struct Options {
  std::string input, output, target;
  std::size_t threads = 1, repeats = 0;
  bool two_buffers = false, before = false;
};

Options parse_options(int argc, char** argv) {
  Options options;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw std::runtime_error("expected a value after " + word + " but got none; do give one");
      return argv[++i];
    };
    if (word == "--target") {
      options.target = value();
    } else if (word == "--threads") {
      options.threads = std::stoul(value());
    } else if (word == "--time") {
      options.repeats = std::stoul(value());
    } else if (word == "--two-buffers") {
      options.two_buffers = true;
    } else if (word == "--before") {
      options.before = true;
    } else {
      positional.push_back(word);
    }
  }
  if (positional.size() != 2) {
    throw std::runtime_error("expected CASE and OUT but got other arguments; do give two files");
  }
  options.input = positional[0];
  options.output = positional[1];
  return options;
}

void write(std::ofstream& out, const Tensor& tensor) {
  out.write(tensor.as<char>(), static_cast<std::streamsize>(tensor.elements()) * 4);
}

void run(const Options& options) {
  const CaseFile c(options.input);
  Configuration configuration;
  std::string error = configure(c.node_attributes(), configuration);
  if (!error.empty()) throw std::runtime_error(error);
  const std::unique_ptr<CpuKernel> kernel = CpuKernel::create(configuration, options.target, error);
  if (kernel == nullptr) throw std::runtime_error(error);
  SpinPool pool(options.threads);

  Tensor state = c.tensors.at("state");
  const HostBuffer second(c.memory.at("state").bytes());
  Tensor next = state;
  if (options.two_buffers) next.data = second.data();
  std::ofstream out(options.output, std::ios::binary);
  json times = json::array();
  const bool update = configuration.mode == Mode::kUpdate;
  std::vector<Operands> calls(c.calls);
  std::vector<std::unique_ptr<HostBuffer>> results;
  for (std::size_t call = 0; call < c.calls; ++call) {
    Operands& operands = calls[call];
    operands = c.inputs(call);
    const Tensor& q = operands[kQ];
    results.push_back(std::make_unique<HostBuffer>(static_cast<std::size_t>(q.elements()) * 4));
    operands[kY] = float_tensor(results.back()->data(), {q.shape[0], q.shape[1], q.shape[2], q.shape[3]});
    if (!update) continue;
    results.push_back(std::make_unique<HostBuffer>(static_cast<std::size_t>(q.shape[0] * q.shape[1]) * kStatCount * 4));
    operands[kStats] = float_tensor(results.back()->data(), {q.shape[0], q.shape[1], kStatCount});
    if (!options.before) continue;
    const std::int64_t chunks = configuration.chunks(q.shape[2]), weights = configuration.all_elements();
    results.push_back(
        std::make_unique<HostBuffer>(static_cast<std::size_t>(q.shape[0] * q.shape[1] * chunks * weights) * 4));
    operands[kInitialWeights] = float_tensor(results.back()->data(), {q.shape[0], q.shape[1], chunks, weights});
  }
  for (std::size_t repeat = 0; repeat < std::max<std::size_t>(options.repeats, 1); ++repeat) {
    json each = json::array();
    for (Operands& operands : calls) {
      operands[kState] = state;
      if (update) operands[kStateOut] = next;
      const auto start = std::chrono::steady_clock::now();
      error = kernel->run(operands, pool.parallel());
      const auto taken = std::chrono::steady_clock::now() - start;
      if (!error.empty()) throw std::runtime_error(error);
      each.push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count());
      if (update) std::swap(state, next);
      if (repeat != 0) continue;
      write(out, operands[kY]);
      for (const Operand which : {kStats, kInitialWeights}) {
        if (operands[which].present()) write(out, operands[which]);
      }
    }
    times.push_back(each);
  }
  write(out, state);
  if (!out.flush())
    throw std::runtime_error("expected to write " + options.output + " but could not; do check the disk");
  if (options.repeats != 0) {
    std::cout << json{{"target", kernel->target()}, {"threads", options.threads}, {"ns", times}}.dump() << "\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 2 && std::string(argv[1]) == "--list-targets") {
      for (const std::string_view target : cpu_targets()) std::cout << target << "\n";
      return 0;
    }
    run(parse_options(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
