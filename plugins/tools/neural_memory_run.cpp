// Runs the bare kernel over calls from a file, for tests against outside oracles and for timing without a runtime.
//
//   neural_memory_run CASE.safetensors OUT.bin [--target NAME] [--threads N] [--two-buffers] [--time REPEATS]
//   neural_memory_run --list-targets
//
// CASE holds `state` and, for each call, its operands by name ("0.q", "0.k", ..., "1.q", ...); its metadata are
// `calls`, their number, and `attributes`, the node's attributes as JSON. The state goes from call to call, in one
// buffer or, with
// --two-buffers, from one of two to the other. OUT receives float32: each call's y and, after an update, its stats; at
// last the state. With --time all calls are repeated, the state flowing on, and stdout has the nanoseconds of each.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/tools/spin_pool.h"

namespace {

using nlohmann::json;
using namespace titans::kernels;

struct Options {
  std::string input, output, target;
  std::size_t threads = 1, repeats = 0;
  bool two_buffers = false;
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

// Memory on a cache line.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})), bytes_(bytes) {
    std::memset(data_, 0xFF, bytes_);  // NaN, so that what is never written is seen
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_;
};

struct Case {
  explicit Case(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::uint64_t length = 0;
    if (raw.size() < sizeof(length)) throw std::runtime_error("expected a safetensors file but got " + path);
    std::memcpy(&length, raw.data(), sizeof(length));
    const json header = json::parse(raw.substr(sizeof(length), length));
    const char* data = raw.data() + sizeof(length) + length;
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        calls = std::stoul(entry.at("calls").get<std::string>());
        attributes = json::parse(entry.at("attributes").get<std::string>());
        continue;
      }
      Tensor tensor;
      const std::string dtype = entry.at("dtype");
      tensor.dtype = dtype == "F32"    ? DType::kFloat32
                     : dtype == "I64"  ? DType::kInt64
                     : dtype == "BOOL" ? DType::kBool
                                       : DType::kOther;
      const std::vector<std::int64_t> shape = entry.at("shape");
      tensor.rank = static_cast<int>(shape.size());
      std::copy(shape.begin(), shape.end(), tensor.shape.begin());
      const std::size_t begin = entry.at("data_offsets")[0], end = entry.at("data_offsets")[1];
      tensor.data = memory.emplace(name, end - begin).first->second.data();
      std::memcpy(tensor.data, data + begin, end - begin);
      tensors[name] = tensor;
    }
  }

  Attributes node_attributes() const {
    Attributes a;
    a.mode = attributes.at("mode");
    a.widths = attributes.at("widths").get<std::vector<std::int64_t>>();
    a.chunk_size = attributes.at("chunk_size");
    a.schedule = attributes.at("schedule");
    a.activation = attributes.at("activation");
    a.residual = attributes.value("residual", a.residual);
    a.layer_norm = attributes.value("layer_norm", a.layer_norm);
    a.storage = attributes.value("storage", a.storage);
    return a;
  }

  std::size_t calls = 0;
  json attributes;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, Buffer> memory;
};

Tensor floats(const Buffer& buffer, std::initializer_list<std::int64_t> shape) {
  Tensor tensor;
  tensor.data = buffer.data();
  tensor.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  return tensor;
}

void write(std::ofstream& out, const Tensor& tensor) {
  out.write(tensor.as<char>(), static_cast<std::streamsize>(tensor.elements()) * 4);
}

void run(const Options& options) {
  const Case c(options.input);
  Configuration configuration;
  std::string error = configure(c.node_attributes(), configuration);
  if (!error.empty()) throw std::runtime_error(error);
  const std::unique_ptr<CpuKernel> kernel = CpuKernel::create(configuration, options.target, error);
  if (kernel == nullptr) throw std::runtime_error(error);
  SpinPool pool(options.threads);

  Tensor state = c.tensors.at("state");
  const Buffer second(c.memory.at("state").bytes());
  Tensor next = state;
  if (options.two_buffers) next.data = second.data();
  std::ofstream out(options.output, std::ios::binary);
  json times = json::array();
  const bool update = configuration.mode == Mode::kUpdate;
  std::vector<Operands> calls(c.calls);
  std::vector<std::unique_ptr<Buffer>> results;
  for (std::size_t call = 0; call < c.calls; ++call) {
    Operands& operands = calls[call];
    for (std::size_t i = kQ; i < kInputs; ++i) {
      const auto found = c.tensors.find(std::to_string(call) + "." + kOperandNames[i]);
      if (found != c.tensors.end()) operands[i] = found->second;
    }
    const Tensor& q = operands[kQ];
    results.push_back(std::make_unique<Buffer>(static_cast<std::size_t>(q.elements()) * 4));
    operands[kY] = floats(*results.back(), {q.shape[0], q.shape[1], q.shape[2], q.shape[3]});
    if (!update) continue;
    results.push_back(std::make_unique<Buffer>(static_cast<std::size_t>(q.shape[0] * q.shape[1]) * kStatCount * 4));
    operands[kStats] = floats(*results.back(), {q.shape[0], q.shape[1], kStatCount});
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
      if (update) write(out, operands[kStats]);
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
