// Runs calls from a file through a plugin library like TensorRT would, without TensorRT. The plugin runs on a GPU, or
// in host memory if the library has the test double.
//
//   tensorrt_plugin_host --gpu CASE.safetensors OUT.bin --plugin LIBRARY
//       [--alias declared|undeclared|two-buffers] [--learn int64|int32|bool] [--time REPEATS [--graph]]
//   tensorrt_plugin_host_cpu --cpu ...
//
// plugins/tools/case_file.h describes CASE; q, k and v may be F32, F16 or BF16. OUT receives float32: each call's y
// and, after an update, its stats. The final state comes last. One engine serves all calls; its profile covers their
// sizes.
//
// The state is carried from call to call in one buffer or, with --alias two-buffers, alternates between two. --learn is
// the dtype of the plugin's input learn. --time repeats all calls with the state carried on, and stdout has the
// nanoseconds of each repeat as JSON. --graph replays them as one CUDA graph.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugins/tools/case_file.h"
#include "plugins/tools/device_memory.h"
#include "tensorrt_plugin_double.h"
#include "tensorrt_plugin_floats.h"
#include "tensorrt_plugin_host.h"

namespace {

using namespace titans::plugin_host;
using namespace titans::kernels;
using nlohmann::json;
using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

// The memory for which this program was built.
#ifdef TITANS_HOST_MEMORY
constexpr bool kOnGpu = false;
#else
constexpr bool kOnGpu = true;
#endif

struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::vector<std::string> files;
  std::string plugin, alias = "undeclared", learn = "int64";
  std::size_t repeats = 0;
  bool graph = false, memory = false;
};

const std::map<std::string, DataType> kLearnTypes{
    {"int64", DataType::kINT64}, {"int32", DataType::kINT32}, {"bool", DataType::kBOOL}};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw Usage("[plugin host] missing value of " + word + ". Fix: give one");
      return argv[++i];
    };
    if (word == "--plugin") {
      options.plugin = value();
    } else if (word == "--alias") {
      options.alias = value();
    } else if (word == "--learn") {
      options.learn = value();
    } else if (word == "--time") {
      options.repeats = std::stoul(value());
    } else if (word == "--graph") {
      options.graph = true;
    } else if (word == (kOnGpu ? "--gpu" : "--cpu")) {
      options.memory = true;
    } else {
      options.files.push_back(word);
    }
  }
  if (options.files.size() != 2 || options.plugin.empty() || !options.memory || kLearnTypes.count(options.learn) == 0) {
    throw Usage(std::string("[plugin host] wrong arguments. Fix: give ") + (kOnGpu ? "--gpu" : "--cpu") +
                " CASE OUT --plugin LIBRARY");
  }
  return options;
}

DataType type_of(const Tensor& tensor) {
  switch (tensor.dtype) {
    case DType::kFloat16:
      return DataType::kHALF;
    case DType::kBFloat16:
      return DataType::kBF16;
    case DType::kInt64:
      return DataType::kINT64;
    case DType::kBool:
      return DataType::kBOOL;
    default:
      return DataType::kFLOAT;
  }
}

std::size_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kINT64:
      return 8;
    case DataType::kHALF:
    case DataType::kBF16:
      return 2;
    case DataType::kBOOL:
      return 1;
    default:
      return 4;
  }
}

std::vector<std::int64_t> shape(const Tensor& tensor) {
  return {tensor.shape.begin(), tensor.shape.begin() + tensor.rank};
}

std::size_t elements(const PluginTensorDesc& tensor) {
  std::size_t count = 1;
  for (const std::int64_t extent : shape_of(tensor.dims)) count *= static_cast<std::size_t>(extent);
  return count;
}

std::size_t bytes(const PluginTensorDesc& tensor) { return elements(tensor) * bytes_of(tensor.type); }

// One call's tensors without the state.
class Call {
 public:
  Call(const Operands& operands, DataType learn, const PluginTensorDesc& pool, bool update) {
    inputs_.push_back(pool);
    in_.push_back(nullptr);
    for (std::size_t i = kQ; i < kInputs; ++i) {
      const Tensor& operand = operands[i];
      if (!operand.present()) continue;
      present_.push_back(static_cast<Operand>(i));
      const DataType type = i == kLearn ? learn : type_of(operand);
      inputs_.push_back(tensor(type, shape(operand)));
      std::vector<char> raw(bytes(inputs_.back()), 0);
      const std::size_t from = bytes_of(type_of(operand)), to = bytes_of(type);
      for (std::size_t at = 0; at < elements(inputs_.back()); ++at) {
        std::memcpy(raw.data() + at * to, operand.as<char>() + at * from, std::min(from, to));
      }
      in_.push_back(add(raw.size()));
      buffers_.back()->upload(raw.data());
    }
    outputs_.push_back(tensor(type_of(operands[kQ]), shape(operands[kQ])));
    out_.push_back(add(bytes(outputs_[0])));
    if (!update) return;
    outputs_.push_back(pool);
    out_.push_back(nullptr);
    outputs_.push_back(tensor(DataType::kFLOAT, {operands[kQ].shape[0], operands[kQ].shape[1], kStatCount}));
    out_.push_back(add(bytes(outputs_[2])));
  }

  const std::vector<Operand>& present() const { return present_; }
  const std::vector<PluginTensorDesc>& inputs() const { return inputs_; }

  void run(const Library& library, Context& context, void* state, void* next, void* workspace) {
    in_[0] = state;
    if (out_.size() > 1) out_[1] = next;
    if (context.run(inputs_, outputs_, in_, out_, workspace, work_stream()) != 0) {
      throw std::runtime_error(library.messages());
    }
  }

  void write_results(std::ofstream& out) const {
    write(out, outputs_[0], *buffers_[buffers_.size() - (out_.size() > 1 ? 2 : 1)]);
    if (out_.size() > 1) write(out, outputs_[2], *buffers_.back());
  }

  static void write(std::ofstream& out, const PluginTensorDesc& description, const DeviceBuffer& buffer) {
    std::vector<char> raw(buffer.bytes());
    buffer.download(raw.data());
    for (std::size_t i = 0; i < elements(description); ++i) {
      float value = 0.0F;
      if (bytes_of(description.type) == sizeof(float)) {
        std::memcpy(&value, raw.data() + i * sizeof(float), sizeof(float));
      } else {
        std::uint16_t bits = 0;
        std::memcpy(&bits, raw.data() + i * sizeof(bits), sizeof(bits));
        value = widen(description.type == DataType::kHALF ? DType::kFloat16 : DType::kBFloat16, bits);
      }
      out.write(reinterpret_cast<const char*>(&value), sizeof(value));
    }
  }

 private:
  void* add(std::size_t size) { return buffers_.emplace_back(std::make_unique<DeviceBuffer>(size))->data(); }

  std::vector<Operand> present_;
  std::vector<PluginTensorDesc> inputs_, outputs_;
  std::vector<const void*> in_;
  std::vector<void*> out_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;  // inputs, y, stats
};

std::vector<Range> profile(const std::vector<Call>& calls) {
  std::vector<Range> ranges;
  for (const PluginTensorDesc& input : calls[0].inputs()) {
    const std::vector<std::int64_t> extents = shape_of(input.dims);
    ranges.push_back({input.type, extents, extents, extents});
  }
  for (const Call& call : calls) {
    if (call.present() != calls[0].present()) {
      throw std::runtime_error("[plugin host] calls with different operands. Fix: split the case");
    }
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      const std::vector<std::int64_t> extents = shape_of(call.inputs()[i].dims);
      for (std::size_t axis = 0; axis < extents.size(); ++axis) {
        ranges[i].least[axis] = std::min(ranges[i].least[axis], extents[axis]);
        ranges[i].most[axis] = std::max(ranges[i].most[axis], extents[axis]);
      }
      ranges[i].typical = ranges[i].most;
    }
  }
  return ranges;
}

void run(const Options& options) {
  const CaseFile file(options.files[0]);
  const Library library(options.plugin);
  if (void* found = library.find(kTitansDouble)) {
    reinterpret_cast<TitansDoubleFunction>(found)().device = {80, 1, 48 * 1024};
  }
  const Attributes attributes = file.read<Attributes>(Configuration::kOperator, kAttributes);
  const bool update = attributes.mode == "update";
  const Tensor& fresh = file.tensors.at("state");
  const PluginTensorDesc pool = tensor(DataType::kFLOAT, shape(fresh));
  std::vector<Call> calls;
  for (std::size_t i = 0; i < file.calls; ++i) {
    calls.emplace_back(file.inputs(i), kLearnTypes.at(options.learn), pool, update);
  }
  std::string names = kOperandNames[kState];
  for (const Operand operand : calls.at(0).present()) names += std::string(",") + kOperandNames[operand];
  const Built built = build(library, Fields(attributes, names, update ? "y,state_out,stats" : "y", options.alias),
                            profile(calls), true);
  Context context(library, built.engine);

  const DeviceBuffer workspace(built.workspace);
  DeviceBuffer first(bytes(pool)), second(bytes(pool));
  first.upload(fresh.data);
  DeviceBuffer *state = &first, *next = update && options.alias == "two-buffers" ? &second : &first;
  const auto run_call = [&](Call& call) {
    call.run(library, context, state->data(), next->data(), workspace.data());
    if (update) std::swap(state, next);
  };
  std::ofstream out(options.files[1], std::ios::binary);
  for (Call& call : calls) {
    run_call(call);
    synchronize();
    call.write_results(out);
  }
  Call::write(out, pool, *state);
  if (!out.flush()) {
    throw std::runtime_error("[plugin host] cannot write " + options.files[1] + ". Fix: check the disk");
  }
  if (options.repeats == 0) return;
  const auto all = [&] {
    for (Call& call : calls) run_call(call);
  };
  std::cout << json{{"ns", time_on_device(all, options.repeats, options.graph)}}.dump() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const Usage& error) {
    std::cerr << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::string what = error.what();
    while (!what.empty() && what.back() == '\n') what.pop_back();
    std::cerr << what << "\n";
    return 1;
  }
  return 0;
}
