// Runs the bare kernel over calls from a file, for tests against independent oracles and for timing without a runtime.
//
//   neural_memory_run CASE.safetensors OUT.bin [--target NAME] [--threads N] [--two-buffers] [--initial-weights]
//                     [--time REPEATS]
//   neural_memory_run --list-targets
//
// case_file.h describes CASE. The state is carried from call to call in one buffer or, with --two-buffers, alternates
// between two. OUT receives float32: each call's y and, after an update, its stats and with --initial-weights that
// output. The final state comes last. With --time, all calls are repeated with the state carried on, and stdout has the
// nanoseconds of each call. Target "textbook" is the kernel of neural_memory_textbook.h.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <string>

#include <nlohmann/json.hpp>

#include "plugins/kernels/cpu_kernel.h"
#include "plugins/kernels/neural_memory_textbook.h"
#include "plugins/tools/case_file.h"
#include "plugins/tools/spin_pool.h"

namespace {

using nlohmann::json;
using namespace titans::kernels;

struct Options {
  std::string input, output, target;
  std::size_t threads = 1, repeats = 0;
  bool two_buffers = false, initial_weights = false;
};

Options parse_options(int argc, char** argv) {
  Options options;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw_error(failure("run", "E0103", "missing value of " + word, "give one"));
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
    } else if (word == "--initial-weights") {
      options.initial_weights = true;
    } else {
      positional.push_back(word);
    }
  }
  if (positional.size() != 2) throw_error(failure("run", "E0103", "missing argument CASE or OUT", "give two files"));
  options.input = positional[0];
  options.output = positional[1];
  return options;
}

void write(std::ofstream& out, const Tensor& tensor) {
  out.write(tensor.as<char>(), static_cast<std::streamsize>(tensor.elements()) * 4);
}

std::unique_ptr<CpuKernel> make_kernel(const Configuration& configuration, const Options& options) {
  std::string error;
  auto kernel = options.target == kTextbookTarget ? make_textbook_kernel(configuration, error)
                                                  : CpuKernel::create(configuration, options.target, error);
  throw_error(error);
  return kernel;
}
std::unique_ptr<CpuKernel> make_kernel(const ChunkConfiguration& configuration, const Options& options) {
  std::string error;
  auto kernel = CpuKernel::create(configuration, options.target, error);
  throw_error(error);
  return kernel;
}

bool updates(const Configuration& configuration) { return configuration.mode == Mode::kUpdate; }
bool updates(const ChunkConfiguration& /*configuration*/) { return true; }

template <class Configuration>
void run(const CaseFile& c, const Options& options) {
  const auto configuration = c.configuration<Configuration>();
  const std::unique_ptr<CpuKernel> kernel = make_kernel(configuration, options);
  SpinPool pool(options.threads);

  Tensor state = c.tensors.at("state");
  const HostBuffer second(c.memory.at("state").bytes());
  Tensor next = state;
  if (options.two_buffers) next.data = second.data();
  std::ofstream out(options.output, std::ios::binary);
  json times = json::array();
  const bool update = updates(configuration);
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
    if (!options.initial_weights) continue;
    if constexpr (std::is_same_v<Configuration, ChunkConfiguration>) {
      const std::int64_t chunks = configuration.chunks(q.shape[2]), weights = configuration.all_elements();
      results.push_back(
          std::make_unique<HostBuffer>(static_cast<std::size_t>(q.shape[0] * q.shape[1] * chunks * weights) * 4));
      operands[kInitialWeights] = float_tensor(results.back()->data(), {q.shape[0], q.shape[1], chunks, weights});
    }
  }
  for (std::size_t repeat = 0; repeat < std::max<std::size_t>(options.repeats, 1); ++repeat) {
    json each = json::array();
    for (Operands& operands : calls) {
      operands[kState] = state;
      if (update) operands[kStateOut] = next;
      const auto start = std::chrono::steady_clock::now();
      const std::string error = kernel->run(operands, pool.parallel());
      const auto taken = std::chrono::steady_clock::now() - start;
      throw_error(error);
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
  if (!out.flush()) {
    throw_error(failure("run", "E1001", "a file cannot be written: " + options.output, "check the disk"));
  }
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
    const Options options = parse_options(argc, argv);
    const CaseFile c(options.input);
    c.op == ChunkConfiguration::kOperator ? run<ChunkConfiguration>(c, options) : run<Configuration>(c, options);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
