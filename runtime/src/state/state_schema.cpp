#include "state/state_schema.h"

#include <numeric>
#include <utility>

#include <nlohmann/json.hpp>

namespace titans::core {
namespace {

using nlohmann::json;

// Uses the hash of the checkpoint, which is shared by bundles of other quantisation, or else the hash of the bundle's
// weights.
json model_of(const Manifest& manifest) {
  const json model = json::parse(manifest.model);
  json out{{"name", nullptr}, {"variant", nullptr}, {"weights_sha256", nullptr}};
  for (const char* key : {"name", "variant"}) {
    if (model.is_object() && model.contains(key)) out[key] = model[key];
  }
  const json source = model.is_object() ? model.value("source", json()) : json();
  if (source.is_object() && source.contains("weights_sha256")) out["weights_sha256"] = source["weights_sha256"];
  const auto weights = manifest.files.find(manifest.weights_file);
  if (!out["weights_sha256"].is_string() && weights != manifest.files.end()) {
    out["weights_xxh3_128"] = weights->second.hash;
  }
  return out;
}

}  // namespace

StateSchema::StateSchema(const Manifest& manifest, std::string backend_name, std::string device_name)
    : model(model_of(manifest).dump()),
      memory(manifest.memory),
      backend(std::move(backend_name)),
      device(std::move(device_name)),
      tensors(manifest.state),
      outputs(static_cast<std::size_t>(manifest.output_size)) {}

std::uint64_t StateSchema::bytes() const {
  return std::accumulate(tensors.begin(), tensors.end(), std::uint64_t{outputs * sizeof(float)},
                         [](std::uint64_t sum, const StateTensor& tensor) { return sum + tensor.bytes; });
}

}  // namespace titans::core
