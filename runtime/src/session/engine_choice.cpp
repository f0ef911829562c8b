#include "session/engine_choice.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include "base/error.h"
#include "base/versions.h"
#include "bundle/manifest_engines.h"

namespace titans::core {
namespace {

// Compilers by descending speed: TensorRT runs our plugin, TensorRT-RTX its own kernels.
constexpr std::array<std::string_view, 3> kCompilers{"tensorrt", "tensorrt_rtx", "onnxruntime"};

std::size_t rank(const EngineRecord& engine) {
  return static_cast<std::size_t>(std::find(kCompilers.begin(), kCompilers.end(), engine.compiler) -
                                  kCompilers.begin());
}

// Why an engine does not fit.
struct Mismatch {
  int depth;  // the number of checks passed; the deepest mismatch belongs to the nearest engine
  std::string problem;
  std::string fix;
};

class CompatibilityCheck {
 public:
  CompatibilityCheck(const DeviceInfo& device_info, const EngineRequest& request)
      : device_info_(device_info), request_(request) {}

  // No value if the engine fits.
  std::optional<Mismatch> look_at(const EngineRecord& engine) const {
    using Check = std::optional<Mismatch> (CompatibilityCheck::*)(const EngineRecord&) const;
    constexpr std::array<Check, 9> kChecks{
        &CompatibilityCheck::device, &CompatibilityCheck::requested,      &CompatibilityCheck::platform,
        &CompatibilityCheck::sm,     &CompatibilityCheck::library,        &CompatibilityCheck::version,
        &CompatibilityCheck::plugin, &CompatibilityCheck::plugin_version, &CompatibilityCheck::driver};
    for (std::size_t depth = 0; depth < kChecks.size(); ++depth) {
      std::optional<Mismatch> mismatch = (this->*kChecks[depth])(engine);
      if (!mismatch) continue;
      mismatch->depth = static_cast<int>(depth);
      return mismatch;
    }
    return std::nullopt;
  }

  // True if all checks pass that need no backend.
  bool fits_device(const EngineRecord& engine) const {
    return !device(engine) && !requested(engine) && !platform(engine) && !sm(engine);
  }

  // The command that builds an engine for this device.
  std::string build_for_this_device() const {
    const std::string_view target = target_name();
    return target.empty() ? text("run titans-export build ", request_.bundle, " with a target of sm ", device_info_.sm,
                                 ", see titans-export build --list-targets")
                          : text("run titans-export build ", request_.bundle, " --target ", target);
  }

 private:
  std::string build_again(const EngineRecord& engine) const {
    return text("run titans-export build ", request_.bundle, " --target ", engine.target);
  }

  // Devices with their own name in `titans-export build --target`, where the compute capability is ambiguous.
  std::string_view target_name() const {
    struct Target {
      int sm;
      std::string_view word;  // part of the device's name
      std::string_view target;
    };
    constexpr std::array<Target, 13> kTargets{{{80, "A100", "a100"},
                                               {86, "", "rtx-30"},
                                               {87, "Nano", "orin-nano"},
                                               {87, "", "orin-agx"},
                                               {89, "L40S", "l40s"},
                                               {89, "L4", "l4"},
                                               {89, "", "rtx-40"},
                                               {90, "H200", "h200"},
                                               {90, "", "h100"},
                                               {100, "", "b200"},
                                               {110, "", "thor"},
                                               {120, "", "rtx-50"},
                                               {121, "", "dgx-spark"}}};
    for (const Target& target : kTargets) {
      if (target.sm == device_info_.sm && device_info_.name.find(target.word) != std::string::npos)
        return target.target;
    }
    return device_info_.kind == "cpu" ? "cpu" : "";
  }

  std::string made_for(const EngineRecord& engine, std::string_view what, std::string_view got) const {
    return text("engine ", engine.name, " is made for ", what, ", got ", got);
  }

  std::optional<Mismatch> device(const EngineRecord& engine) const {
    if (engine.device == device_info_.kind) return std::nullopt;
    return Mismatch{0, made_for(engine, engine.device, device_info_.kind),
                    text("open the session on ", engine.device, ", or ", build_for_this_device())};
  }

  std::optional<Mismatch> requested(const EngineRecord& engine) const {
    if (!request_.backend.empty() && request_.backend != engine.compiler) {
      return Mismatch{0,
                      text("engine ", engine.name, " needs the backend ", engine.compiler, ", got ", request_.backend),
                      "omit the backend, or name that one"};
    }
    const bool ours = request_.memory_kernel == "require" && engine.memory == "standard-operators";
    const bool theirs = request_.memory_kernel == "off" && engine.memory == "plugin";
    if (!ours && !theirs) return std::nullopt;
    return Mismatch{0,
                    text("engine ", engine.name, " computes the memory with ",
                         ours ? "standard operators" : "our plugin", ", got memory_kernel ", request_.memory_kernel),
                    "leave memory_kernel at auto, or open another engine"};
  }

  std::optional<Mismatch> platform(const EngineRecord& engine) const {
    if (engine.platform == device_info_.platform) return std::nullopt;
    return Mismatch{0, made_for(engine, engine.platform, device_info_.platform),
                    text(build_for_this_device(), " on this machine")};
  }

  std::optional<Mismatch> sm(const EngineRecord& engine) const {
    if (engine.device != "cuda") return std::nullopt;
    if (std::find(engine.sm.begin(), engine.sm.end(), device_info_.sm) != engine.sm.end()) return std::nullopt;
    std::string made;
    for (const int one : engine.sm) made += text(made.empty() ? "sm " : ", ", one);
    return Mismatch{0, made_for(engine, made, text("sm ", device_info_.sm, " (", device_info_.name, ")")),
                    build_for_this_device()};
  }

  const LibraryInfo* library_of(const EngineRecord& engine) const {
    const auto found = device_info_.libraries.find(module_of(engine));
    return found == device_info_.libraries.end() ? nullptr : &found->second;
  }

  std::optional<Mismatch> library(const EngineRecord& engine) const {
    const LibraryInfo* library = library_of(engine);
    const std::string needed =
        text("engine ", engine.name, " needs the library of ", engine.compiler, " ", engine.compiler_version);
    const std::string fix = text("install ", engine.compiler, " ", engine.compiler_version, ", or ",
                                 build_again(engine), " with the installed version");
    if (library == nullptr) return Mismatch{0, text(needed, ", but there is no backend ", engine.compiler), fix};
    if (library->why_not.empty()) return std::nullopt;
    return Mismatch{0, text(needed, ": ", library->why_not), fix};
  }

  std::optional<Mismatch> version(const EngineRecord& engine) const {
    const std::string& installed = library_of(engine)->version;
    if (installed.empty()) return std::nullopt;
    const std::optional<Version> wanted = Version::parse(engine.compiler_version);
    const std::optional<Version> got = Version::parse(installed);
    // ONNX Runtime reads models of its older releases. TensorRT does not promise that.
    const bool fits = wanted && got && wanted->major == got->major &&
                      (engine.compiler == "onnxruntime" ? got->minor >= wanted->minor : got->minor == wanted->minor);
    if (fits) return std::nullopt;
    return Mismatch{
        0,
        text("engine ", engine.name, " needs ", engine.compiler, " ", wanted ? wanted->text() : engine.compiler_version,
             ", got ", installed),
        text(build_again(engine), " with ", engine.compiler, " ", installed, ", or install ", engine.compiler_version)};
  }

  std::optional<Mismatch> plugin(const EngineRecord& engine) const {
    const LibraryInfo& library = *library_of(engine);
    if (!engine.plugin || library.plugin_why_not.empty()) return std::nullopt;
    return Mismatch{
        0, text("engine ", engine.name, " needs the plugin ", engine.plugin->name, ": ", library.plugin_why_not),
        "build the runtime with -DTENSORRT_ROOT=FOLDER, and put the plugin beside its backend"};
  }

  std::optional<Mismatch> plugin_version(const EngineRecord& engine) const {
    const LibraryInfo& library = *library_of(engine);
    if (!engine.plugin || library.plugin_version.empty()) return std::nullopt;
    if (library.plugin_version == engine.plugin->version) return std::nullopt;
    return Mismatch{0,
                    text("engine ", engine.name, " needs version ", engine.plugin->version, " of the plugin ",
                         engine.plugin->name, ", got ", library.plugin_version),
                    text(build_again(engine), " with the installed plugin")};
  }

  std::optional<Mismatch> driver(const EngineRecord& engine) const {
    if (device_info_.driver >= engine.driver) return std::nullopt;
    const auto cuda_text = [](int version) { return text(version / 1000, ".", version % 1000 / 10); };
    return Mismatch{0,
                    text("engine ", engine.name, " needs a driver of CUDA ", cuda_text(engine.driver),
                         " or newer, got CUDA ", cuda_text(device_info_.driver)),
                    text("update the NVIDIA driver, or ", build_again(engine), " with an older CUDA")};
  }

  const DeviceInfo& device_info_;
  const EngineRequest& request_;
};

[[noreturn]] void refuse(const Mismatch& mismatch) {
  throw Error(TITANS_UNSUPPORTED, "E0606", "session", mismatch.problem, mismatch.fix);
}

std::string names_of(const Manifest& manifest) {
  std::string names;
  for (const EngineRecord& engine : manifest.engines) names += text(names.empty() ? "" : ", ", engine.name);
  return names.empty() ? "none: the bundle has no engines" : names;
}

std::string describe(const EngineRecord& engine, const DeviceInfo& device_info) {
  return text(engine.compiler, " ", engine.compiler_version, ", ", engine.precision, ", made for ",
              engine.device == "cuda" ? text("sm ", device_info.sm) : engine.platform);
}

EngineChoice insist(const Manifest& manifest, const CompatibilityCheck& check, const DeviceInfo& device_info,
                    const EngineRequest& request) {
  for (const EngineRecord& engine : manifest.engines) {
    if (engine.name != request.engine) continue;
    const std::optional<Mismatch> mismatch = check.look_at(engine);
    if (mismatch) refuse(*mismatch);
    return {
        &engine, engine.compiler, module_of(engine), text("asked for by name; ", describe(engine, device_info)), {}};
  }
  throw Error(TITANS_INVALID_ARGUMENT, "E0605", "session",
              text("no engine ", quoted(request.engine), " in the bundle; it has ", names_of(manifest)),
              "name one of these, or none for the plain graphs");
}

EngineChoice plain(const EngineRequest& request, const std::string& backend, std::string reason) {
  const std::string& chosen = request.backend.empty() ? backend : request.backend;
  return {nullptr, chosen, chosen, std::move(reason), {}};
}

}  // namespace

std::string module_of(const EngineRecord& engine) {
  if (engine.compiler != "tensorrt") return engine.compiler;
  return text(engine.compiler, "_", engine.compiler_version.substr(0, engine.compiler_version.find('.')));
}

std::vector<std::string> modules_to_look_at(const Manifest& manifest, const DeviceInfo& device_info,
                                            const EngineRequest& request) {
  const CompatibilityCheck check(device_info, request);
  std::vector<std::string> modules;
  for (const EngineRecord& engine : manifest.engines) {
    const bool meant = request.engine.empty() || request.engine == engine.name;
    const std::string module = module_of(engine);
    const bool known = std::find(modules.begin(), modules.end(), module) != modules.end();
    // Libraries are opened only under names from kCompilers, never under names from the bundle alone.
    const bool ours = rank(engine) < kCompilers.size();
    if (meant && ours && !known && check.fits_device(engine)) modules.push_back(module);
  }
  return modules;
}

EngineChoice choose_engine(const Manifest& manifest, const DeviceInfo& device_info, const EngineRequest& request,
                           const std::string& plain_backend) {
  const CompatibilityCheck check(device_info, request);
  if (request.engine == kNoEngine) return plain(request, plain_backend, "the plain graphs were asked for");
  if (!request.engine.empty()) return insist(manifest, check, device_info, request);

  const EngineRecord* best = nullptr;
  std::vector<std::pair<std::string, std::string>> others;
  std::optional<Mismatch> nearest;
  std::vector<const EngineRecord*> fitting;
  for (const EngineRecord& engine : manifest.engines) {
    std::optional<Mismatch> mismatch = check.look_at(engine);
    if (!mismatch) {
      fitting.push_back(&engine);
      if (best == nullptr || rank(engine) < rank(*best)) best = &engine;
      continue;
    }
    others.emplace_back(engine.name, mismatch->problem);
    if (!nearest || mismatch->depth > nearest->depth) nearest = std::move(mismatch);
  }
  if (best != nullptr) {
    for (const EngineRecord* engine : fitting) {
      if (engine != best) others.emplace_back(engine->name, text("fits, but ", best->name, " comes first"));
    }
    EngineChoice choice{best, best->compiler, module_of(*best), describe(*best, device_info), std::move(others)};
    if (fitting.size() > 1) choice.reason += text("; the first of ", fitting.size(), " engines that fit");
    return choice;
  }
  // A request for ONNX Runtime selects the plain graphs if no engine uses ONNX Runtime.
  const bool plain_requested = request.backend == plain_backend;
  const bool any_for_kind = std::any_of(manifest.engines.begin(), manifest.engines.end(),
                                        [&](const EngineRecord& engine) { return engine.device == device_info.kind; });
  if (!plain_requested && !request.backend.empty()) {
    if (nearest && nearest->depth > 1) refuse(*nearest);
    throw Error(TITANS_UNSUPPORTED, "E0605", "session",
                text("no engine made by ", request.backend, " in the bundle; it has ", names_of(manifest)),
                check.build_for_this_device());
  }
  if (device_info.kind != "cpu" && any_for_kind && !plain_requested) {
    nearest->fix += ", or open with the engine none, for the plain graphs";
    refuse(*nearest);
  }
  EngineChoice choice = plain(request, plain_backend,
                              manifest.engines.empty() ? "the bundle has no engines" : "no engine fits the device");
  choice.others = std::move(others);
  return choice;
}

}  // namespace titans::core
