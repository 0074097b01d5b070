// SPDX-License-Identifier: BSD-3-Clause
// The dictionary of the Chinese tokenizer for C programs: read from jieba's file.
#include <cmath>
#include <exception>
#include <new>
#include <unordered_map>
#include <utility>

#include "fastops/fastops.h"
#include "wordcount/wordcount_zh.h"

namespace fastops {
namespace {

static_assert(kHanCount == FASTOPS_ZH_CHARACTERS);

// The word of a line and its frequency; false where the line is none.
bool entry(std::string_view line, std::string_view* word, std::uint64_t* frequency) {
  constexpr const char* kSpaces = " \t\n\v\f\r";
  const std::size_t first = line.find_first_not_of(kSpaces);
  if (first == line.npos) return false;
  line = line.substr(first, line.find_last_not_of(kSpaces) + 1 - first);
  const std::size_t space = line.find(' ');
  if (space == line.npos) return false;
  *word = line.substr(0, space);
  *frequency = 0;
  std::size_t i = space + 1;
  for (; i < line.size() && zh::is_digit(static_cast<unsigned char>(line[i])); ++i) {
    if (*frequency > std::uint64_t{1} << 58) return false;
    *frequency = *frequency * 10 + static_cast<std::uint64_t>(line[i] - '0');
  }
  return i > space + 1 && (i == line.size() || line[i] == ' ');
}

// Null with *line where a line is wrong; throws as ZhModel does.
ZhModel* read_model(std::string_view text, const fastops_zh_hmm* hmm, std::size_t* line) {
  std::unordered_map<std::string_view, std::uint64_t> words;
  double total = 0;
  *line = 0;
  while (!text.empty()) {
    ++*line;
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view word;
    std::uint64_t frequency = 0;
    if (!entry(text.substr(0, end), &word, &frequency)) return nullptr;
    words[word] = frequency;  // the last of several counts, the sum is of all
    total += static_cast<double>(frequency);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  *line = 0;
  if (total <= 0) return nullptr;
  std::vector<std::uint64_t> frequencies;
  for (const auto& [word, frequency] : words)
    if (frequency > 0) frequencies.push_back(frequency);
  std::sort(frequencies.begin(), frequencies.end());
  frequencies.erase(std::unique(frequencies.begin(), frequencies.end()), frequencies.end());
  const double log_total = std::log(total);
  std::vector<double> weights{std::log(1.0) - log_total};
  for (const std::uint64_t frequency : frequencies)
    weights.push_back(std::log(static_cast<double>(frequency)) - log_total);
  std::string all;
  std::vector<std::uint32_t> numbers;
  for (const auto& [word, frequency] : words) {
    if (frequency == 0) continue;
    all.append(word).push_back('\n');
    const auto place = std::lower_bound(frequencies.begin(), frequencies.end(), frequency) - frequencies.begin();
    numbers.push_back(static_cast<std::uint32_t>(place + 1));
  }
  ZhHmm model{};
  if (hmm != nullptr) {
    std::copy(std::begin(hmm->start), std::end(hmm->start), std::begin(model.start));
    for (int i = 0; i < 4; ++i)
      std::copy(std::begin(hmm->trans[i]), std::end(hmm->trans[i]), std::begin(model.trans[i]));
    model.emit.assign(hmm->emit, hmm->emit + std::size_t{kHanCount} * 4);
  }
  return new ZhModel(all.data(), all.size(), numbers.data(), numbers.size(), std::move(weights), hmm != nullptr,
                     std::move(model));
}

}  // namespace
}  // namespace fastops

extern "C" {

fastops_status fastops_zh_model_create(const char* dictionary, size_t size, const fastops_zh_hmm* hmm,
                                       fastops_zh_model** model, size_t* line) noexcept {
  *model = nullptr;
  try {
    const std::string_view text = size == 0 ? std::string_view() : std::string_view(dictionary, size);
    *model = reinterpret_cast<fastops_zh_model*>(fastops::read_model(text, hmm, line));
    return *model == nullptr ? FASTOPS_INVALID : FASTOPS_OK;
  } catch (const std::bad_alloc&) {
    return FASTOPS_NO_MEMORY;
  } catch (const std::exception&) {
    *line = 0;
    return FASTOPS_INVALID;
  }
}

void fastops_zh_model_destroy(fastops_zh_model* model) noexcept { delete reinterpret_cast<fastops::ZhModel*>(model); }

}  // extern "C"
