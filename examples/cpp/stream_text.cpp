// stream_text BUNDLE FILE: how many bits per byte a model of bytes needs for a file, learning as it reads.
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>

#include "titans/titans.hpp"

namespace {

constexpr std::size_t kBlock = 4096;

double bits_per_byte(titans::Stream& stream, std::istream& file) {
  double nats = 0.0;
  std::size_t bytes = 0;
  std::string block(kBlock, '\0');
  while (file.read(block.data(), kBlock) || file.gcount() > 0) {
    const auto* first = reinterpret_cast<const unsigned char*>(block.data());
    const titans::Tokens tokens(first, first + file.gcount());
    for (const float logprob : stream.score(tokens)) nats -= static_cast<double>(logprob);
    bytes += tokens.size();
  }
  if (bytes == 0) throw std::runtime_error("the file is empty or cannot be read");
  return nats / std::log(2.0) / static_cast<double>(bytes);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: stream_text BUNDLE FILE");
  std::ifstream file(argv[2], std::ios::binary);
  if (!file) throw std::runtime_error("cannot open the file");
  titans::Session session(argv[1]);
  titans::Stream stream = session.stream();
  std::printf("bits_per_byte: %.6f\n", bits_per_byte(stream, file));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "stream_text: %s\n", error.what());
  return 1;
}
