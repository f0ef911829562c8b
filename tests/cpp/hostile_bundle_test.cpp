// Malicious bundles. Their hashes are correct, so the readers reach their contents. tests/fuzz/corpus has the fuzzers'
// findings.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include <gtest/gtest.h>

#include "base/names.h"
#include "bundle/bundle.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using nlohmann::json;

class HostileBundle : public testing::Test {
 protected:
  // Computes the sizes and hashes of the actual files.
  void refuse(const json& manifest, const std::vector<std::string>& words) {
    write_manifest(folder_.path(), manifest);
    refuse(words);
  }
  void refuse(const std::vector<std::string>& words) {
    expect_error(TITANS_FAILED, words, [&] { core::Bundle bundle(folder_.path()); });
  }
  void refuse_manifest(const std::string& text, const std::vector<std::string>& words) {
    write_file(folder_.path() / "manifest.json", text);
    refuse(words);
  }
  std::string manifest_text() const { return read_file(folder_.path() / "manifest.json"); }

  TemporaryFolder folder_;
  const std::string manifest_text_ = (write_bundle(folder_.path()), manifest_text());
};

// Every field that names a file, with the name listed and the file readable.
TEST_F(HostileBundle, NamesThatLeadOutOfTheBundle) {
  const std::filesystem::path outside = folder_.path() / "outside";
  std::filesystem::create_directory(outside);
  write_file(outside / "secret", read_file(folder_.path() / "state.safetensors"));
  const core::MappedFile secret(outside / "secret");
  const json record{{"bytes", secret.size()}, {"xxh3_128", secret.hash()}};
  const std::string absolute = (outside / "secret").string();
  for (const std::string& name : {std::string("outside/secret"), std::string("./outside/secret"), absolute,
                                  std::string("..\\secret"), std::string("outside/../state.safetensors")}) {
    for (const char* place : {"/initial_state/file", "/weights/file", "/graphs/0/file", "/tokenizer/file"}) {
      json manifest = manifest_json();
      manifest["tokenizer"] = {{"kind", "file"}, {"file", "state.safetensors"}};
      manifest[json::json_pointer(place)] = name;
      manifest["files"][name] = record;
      refuse(manifest, {"a plain file name"});
    }
  }
}

TEST_F(HostileBundle, EnginesWhoseFilesLeadOutOfTheBundle) {
  json engine = json::parse(R"({"name": "e", "target": "cpu", "compiler": "onnxruntime", "compiler_version": "1.20.0",
    "precision": "fp32", "device": "cpu", "platform": "linux-x86_64", "memory": "either",
    "graphs": [{"graph": "decode", "file": "../a.onnx"}]})");
  json manifest = manifest_json();
  manifest["engines"] = {engine};
  refuse(manifest, {"engines[0].graphs[0].file", "a plain file name"});
  engine["graphs"][0]["file"] = "decode.onnx";
  engine["weights"] = {{"file", "/etc/passwd"}};
  manifest["engines"] = {engine};
  refuse(manifest, {"engines[0].weights.file", "a plain file name"});
}

// Each of these files would block a reader, never end, or lead outside the bundle.
TEST_F(HostileBundle, FilesThatAreNone) {
  for (const char* name : {"manifest.json", "state.safetensors", "weights.safetensors", "prefill.onnx"}) {
    const std::filesystem::path path = folder_.path() / name;
    const std::string content = read_file(path);
    std::filesystem::remove(path);
    ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
    refuse({name, "not a regular file"});
    std::filesystem::remove(path);
    for (const char* target : {"/dev/zero", "/dev/tty", "/etc/passwd", "state.safetensors"}) {
      std::filesystem::create_symlink(target, path);
      refuse({name, "symbolic link"});
      std::filesystem::remove(path);
    }
    const int descriptor = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    ASSERT_LT(path.string().size(), sizeof(address.sun_path));
    std::strcpy(address.sun_path, path.c_str());
    ASSERT_EQ(::bind(descriptor, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    refuse({name});
    ::close(descriptor);
    std::filesystem::remove(path);
    write_file(path, content);
  }
  EXPECT_NO_THROW(core::Bundle{folder_.path()});
}

// False sizes. A reader must not allocate for them; otherwise the test would run out of memory.
TEST_F(HostileBundle, SizesBeyondTheFile) {
  const std::filesystem::path state = folder_.path() / "state.safetensors";
  std::string huge(8, '\0');
  huge[7] = 0x10;  // 2^60 bytes of header
  write_file(state, huge + "{}");
  refuse(manifest_json(), {"state.safetensors", "a header of at most 2 bytes", "1152921504606846976"});
  const std::int64_t half = std::int64_t{1} << 32;
  const json entries[] = {{{"dtype", "F32"}, {"shape", {half, half, 4}}, {"data_offsets", {0, 0}}},
                          {{"dtype", "F32"}, {"shape", {half, half}}, {"data_offsets", {0, 0}}},
                          {{"dtype", "U8"}, {"shape", {std::int64_t{1} << 60}}, {"data_offsets", {0, 8}}},
                          {{"dtype", "U8"}, {"shape", {8}}, {"data_offsets", {0, std::int64_t{1} << 62}}}};
  for (const json& entry : entries) {
    write_file(state, safetensors(json{{"layers.0.memory", entry}}.dump(), std::string(8, 'x')));
    refuse(manifest_json(), {"state.safetensors", "layers.0.memory"});
  }
  write_bundle(folder_.path());
  json manifest = manifest_json();
  manifest["state"][0]["shape"] = {1, half, half};
  manifest["state"][0].erase("layout");
  refuse(manifest, {"state[0].shape"});
  manifest["state"][0]["shape"] = {1, 1, std::int64_t{1} << 60};
  refuse(manifest, {"layers.0.memory"});
  manifest = manifest_json();
  manifest["state"][0]["layout"][0]["shape"] = {half, half};
  refuse(manifest, {"state[0].layout[0]"});
}

// A sparse file of 1 TiB. The size is checked before the hash, so the file is not read.
TEST_F(HostileBundle, AFileWithHoles) {
  const std::filesystem::path state = folder_.path() / "state.safetensors";
  const std::string manifest = manifest_text();
  std::filesystem::resize_file(state, std::uintmax_t{1} << 40);
  refuse({"state.safetensors", "1099511627776"});
  EXPECT_EQ(manifest_text(), manifest);
}

TEST_F(HostileBundle, JsonWithoutEnd) {
  refuse_manifest(std::string(1 << 20, '['), {"manifest.json", "deeper than 64 levels"});
  std::string objects;
  for (int i = 0; i < (1 << 18); ++i) objects += "{\"a\":";
  refuse_manifest(objects, {"manifest.json", "deeper than 64 levels"});
  json manifest = manifest_json();
  manifest["model"]["note"] = std::string(17 << 20, 'x');
  refuse(manifest, {"manifest.json", "at most 16777216 bytes"});
}

TEST_F(HostileBundle, AKeyThatIsThereTwice) {
  const std::string text = manifest_text();
  refuse_manifest(R"({"weights": {"file": "other"}, )" + text.substr(1), {"twice in one object", "weights"});
  std::string inner = text;
  inner.replace(inner.find("\"bytes\""), 1, "\"bytes\":1,\"");
  refuse_manifest(inner, {"twice in one object", "bytes"});
  write_file(folder_.path() / "state.safetensors",
             safetensors(R"({"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
                             "x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})",
                         ""));
  refuse(manifest_json(), {"state.safetensors", "twice in one object"});
}

TEST_F(HostileBundle, ErrorsStayOneLineAndShowNoControlCharacters) {
  const std::string text = manifest_text();
  refuse_manifest(R"({"a\u001b[2J\n": 1, )" + text.substr(1), {"a key of at most 512 bytes without hidden characters"});
  json manifest = manifest_json();
  manifest["state"][0]["dtype"] = "\x1b]0;title\x07\n" + std::string(100000, 'x');
  write_manifest(folder_.path(), manifest);
  try {
    core::Bundle bundle(folder_.path());
    FAIL() << "no error";
  } catch (const core::Error& error) {
    const std::string message = error.what();
    EXPECT_LT(message.size(), 400U);
    EXPECT_EQ(message.find('\x1b'), std::string::npos) << message;
  }
}

// Texts that are not JSON, or that readers understand differently.
TEST_F(HostileBundle, JsonThatReadersCouldUnderstandDifferently) {
  const std::string rest = manifest_text().substr(1);
  for (const char* member : {R"("a": NaN)",
                             R"("a": Infinity)",
                             R"("a": 1e999)",
                             R"("a": -1e999)",
                             R"("a": -0)",
                             R"("a": [-0])",
                             R"("a": 18446744073709551616)",
                             R"("a": -9223372036854775809)",
                             R"("a": "\ud800")",
                             R"("a": "\u0000")",
                             "\"a\": \"\x7f\"",
                             R"("a": "\u202e")",
                             R"("a": "\u200b")",
                             R"("\u001b": 1)",
                             "\"a\": \"\xff\"",
                             "\"a\": \"\xc0\x80\"",
                             R"("a": 01)",
                             R"("a": .5)",
                             R"("a": 0x1)",
                             R"("a": +1)",
                             R"('a': 1)",
                             "/* c */ \"a\": 1",
                             "\"a\": \"\n\"",
                             R"("a": 1,)"}) {
    refuse_manifest(core::text("{", member, ", ", rest), {"manifest.json"});
  }
  refuse_manifest(core::text("\xef\xbb\xbf{", rest), {"not JSON"});
  refuse_manifest(core::text("{", rest, std::string(1, '\0')), {"not JSON"});
  refuse_manifest(core::text("{", rest, "{}"), {"not JSON"});
  refuse_manifest(core::text("{\"", std::string(513, 'k'), "\": 1, ", rest), {"at most 512 bytes"});
  std::string many = "{\"a\": [";
  for (int i = 0; i < (1 << 20); ++i) many += "1,";
  refuse_manifest(core::text(many, "1], ", rest), {"more than 1048576 values"});
  write_file(folder_.path() / "manifest.json",
             core::text(R"({"a": [18446744073709551615, -0.0, 1e3, "\u00e9"], )", rest));
  EXPECT_NO_THROW(core::Bundle{folder_.path()});
}

// Keys that a hash table would put into one bucket take no more time than others.
TEST_F(HostileBundle, ManyKeysTakeLinearTime) {
  const auto seconds = [&](int count) {
    std::string members;
    for (int i = 0; i < count; ++i) members += core::text("\"k", i, "\": 1, ");
    write_file(folder_.path() / "manifest.json", core::text("{", members, manifest_text_.substr(1)));
    const std::clock_t began = std::clock();
    core::Bundle bundle(folder_.path());
    return static_cast<double>(std::clock() - began) / CLOCKS_PER_SEC;
  };
  seconds(1000);
  EXPECT_LT(seconds(200'000), 60 * std::max(seconds(20'000), 0.01));
}

// Every name of a manifest: parts of paths, words of scripts, labels.
TEST_F(HostileBundle, NamesThatAreNotPlain) {
  const std::vector<std::string> hostile{"",
                                         ".",
                                         "..",
                                         "../x",
                                         "/etc/passwd",
                                         "a b",
                                         "a;b",
                                         "$(id)",
                                         "`x`",
                                         "a'b",
                                         "a\"b",
                                         "-rf",
                                         ".ssh",
                                         "a\\b",
                                         "a\nb",
                                         "\x1b]0;t\x07",
                                         "é",
                                         "a\u202e",
                                         "\xff",
                                         std::string(129, 'x'),
                                         std::string("a\0b", 3)};
  for (const std::string& name : hostile) {
    EXPECT_FALSE(core::is_plain(name)) << name;
    for (const char* place : {"/state/0/name", "/state/0/input", "/state/0/output", "/state/0/role", "/input/name",
                              "/output/name", "/controls/position", "/controls/learn", "/graphs/0/name",
                              "/graphs/0/file", "/weights/file", "/initial_state/file", "/state/0/layout/0/name"}) {
      json manifest = manifest_json();
      manifest[json::json_pointer(place)] = name;
      refuse_manifest(manifest.dump(-1, ' ', false, json::error_handler_t::replace), {"manifest.json"});
    }
    json manifest = json::parse(manifest_text_);
    manifest["files"][name] = {{"bytes", 0}, {"xxh3_128", "0"}};
    refuse_manifest(manifest.dump(-1, ' ', false, json::error_handler_t::replace), {"manifest.json"});
  }
  for (const char* name : {"decode", "layers.0.memory.W0", "_x", "linux-x86_64", "10.3.0+cu12"}) {
    EXPECT_TRUE(core::is_plain(name));
  }
}

// The checked file is the one that is used, even if it is replaced in the folder afterwards.
TEST_F(HostileBundle, AFileThatIsReplacedAfterTheCheck) {
  const core::Bundle bundle(folder_.path());
  float before = 0.0F;
  std::memcpy(&before, bundle.initial_state().at("layers.0.memory").data, sizeof(before));
  const std::filesystem::path state = folder_.path() / "state.safetensors";
  write_file(folder_.path() / "aside", std::string(std::filesystem::file_size(state), '\x7f'));
  std::filesystem::rename(folder_.path() / "aside", state);
  float after = 0.0F;
  std::memcpy(&after, bundle.initial_state().at("layers.0.memory").data, sizeof(after));
  EXPECT_EQ(after, before);
}

}  // namespace
}  // namespace titans::test
