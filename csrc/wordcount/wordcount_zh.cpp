// SPDX-License-Identifier: BSD-3-Clause
// Builds the double array of a dictionary: nodes with many children first, so that the small ones fill the gaps.
#include "wordcount/wordcount_zh.h"

#include <stdexcept>
#include <utility>

namespace fastops {
namespace {

constexpr std::uint32_t kNone = 0xffffffff;

// The characters of one word; empty where one of them is in no run of word characters, so that the word never occurs.
std::vector<std::uint32_t> code_points(const unsigned char* p, const unsigned char* end) {
  std::vector<std::uint32_t> found;
  while (p < end) {
    std::uint32_t code = 0;
    unsigned subpart = 1;
    const unsigned length = decode(p, end, &code, &subpart);
    if (length == 0) return {};
    if (code < 0x80 ? !zh::is_word_ascii(static_cast<unsigned char>(code)) : code < kFirstHan || code > kLastHan)
      return {};
    found.push_back(code);
    p += length;
  }
  return found;
}

struct Word {
  std::vector<std::uint16_t> codes;
  std::uint32_t number;
};

// Words [first, last) share the node's prefix of `depth` characters.
struct Node {
  std::size_t first, last, depth, children, unit;
};

// Places in the array: which are free, and which bases are taken (check() knows the character alone, so that two nodes
// must not have the same base).
class Places {
 public:
  explicit Places(std::size_t alphabet) : alphabet_(alphabet) {}

  // A base >= 1 at which all `codes` (ascending) are free; they are then taken.
  std::size_t take(const std::vector<std::uint16_t>& codes) {
    // Small nodes fill gaps from the front; of large ones about this size none fitted before the last one's place.
    std::size_t& last = last_[codes.size() < 4 ? 0 : 31 - __builtin_clz(static_cast<unsigned>(codes.size()))];
    std::size_t place = std::max({first_free_, last, std::size_t{codes[0]} + 1});
    for (;; ++place) {
      grow(place + alphabet_ + 2);
      place = next_free(place);
      const std::size_t base = place - codes[0];
      if (base_taken_[base]) continue;
      grow(base + alphabet_ + 2);
      bool fits = true;
      for (std::size_t k = 1; k < codes.size() && fits; ++k) fits = skip_[base + codes[k]] == 0;
      if (!fits) continue;
      if (base > ZhModel::kMaxBase) throw std::length_error("dictionary has too many words");
      base_taken_[base] = 1;
      highest_ = std::max(highest_, base);
      for (const std::uint16_t code : codes) skip_[base + code] = 1;
      while (first_free_ < skip_.size() && skip_[first_free_] != 0) ++first_free_;
      if (codes.size() >= 4) last = place;
      return base;
    }
  }
  // One more than the last unit that any taken base can lead to.
  std::size_t size() const { return highest_ + alphabet_ + 2; }

 private:
  // skip_[i] is 0 where i is free, else a distance to go from there to the next place that may be free.
  std::size_t next_free(std::size_t place) {
    const std::size_t start = place;
    while (place < skip_.size() && skip_[place] != 0) place += skip_[place];
    grow(place + alphabet_ + 2);
    for (std::size_t i = start; i < place;) {
      const std::size_t step = skip_[i];
      skip_[i] = static_cast<std::uint32_t>(place - i);
      i += step;
    }
    return place;
  }
  void grow(std::size_t size) {
    if (size <= skip_.size()) return;
    size = std::max(size, skip_.size() + skip_.size() / 4);
    skip_.resize(size, 0);
    base_taken_.resize(size, 0);
  }

  std::size_t alphabet_, first_free_ = 1, highest_ = 0, last_[17] = {};
  std::vector<std::uint32_t> skip_;
  std::vector<std::uint8_t> base_taken_;
};

}  // namespace

ZhModel::ZhModel(const char* words, std::size_t size, const std::uint32_t* numbers, std::size_t count,
                 std::vector<double> weights, bool has_hmm, ZhHmm hmm)
    : han_(kHanCount), weights_(std::move(weights)), has_hmm_(has_hmm), hmm_(std::move(hmm)) {
  if (weights_.empty() || weights_.size() > kMaxWeights + 1)
    throw std::length_error("dictionary has too many frequencies");
  if (has_hmm_ && hmm_.emit.size() != std::size_t{kHanCount} * 4)
    throw std::invalid_argument("emissions do not fit the characters");

  std::vector<std::pair<std::vector<std::uint32_t>, std::uint32_t>> texts;
  std::vector<std::uint32_t> uses(kLastHan + 1);
  const auto* p = reinterpret_cast<const unsigned char*>(words);
  const unsigned char* const end = p + size;
  for (std::size_t i = 0; i < count; ++i) {
    const auto* const stop =
        p == end ? nullptr : static_cast<const unsigned char*>(std::memchr(p, '\n', static_cast<std::size_t>(end - p)));
    if (stop == nullptr || numbers[i] == 0 || numbers[i] >= weights_.size())
      throw std::invalid_argument("words and their numbers do not fit each other");
    std::vector<std::uint32_t> found = code_points(p, stop);
    for (const std::uint32_t code : found) ++uses[code];
    if (!found.empty()) texts.emplace_back(std::move(found), numbers[i]);
    p = stop + 1;
  }
  if (p != end) throw std::invalid_argument("words and their numbers do not fit each other");

  // Frequent characters first: their units lie close together.
  std::vector<std::uint32_t> order;
  for (std::uint32_t code = 0; code <= kLastHan; ++code)
    if (uses[code] > 0) order.push_back(code);
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return uses[a] > uses[b]; });
  const auto alphabet = static_cast<std::uint16_t>(order.size());
  const auto unknown = static_cast<std::uint16_t>(alphabet + 1);
  std::fill(std::begin(ascii_), std::end(ascii_), unknown);
  std::fill(han_.begin(), han_.end(), unknown);
  for (std::uint16_t k = 0; k < alphabet; ++k)
    (order[k] < 0x80 ? ascii_[order[k]] : han_[order[k] - kFirstHan]) = static_cast<std::uint16_t>(k + 1);

  std::vector<Word> sorted;
  sorted.reserve(texts.size());
  for (const auto& [text, number] : texts) {
    Word word{{}, number};
    for (const std::uint32_t c : text) word.codes.push_back(code(c));
    sorted.push_back(std::move(word));
  }
  std::sort(sorted.begin(), sorted.end(), [](const Word& a, const Word& b) { return a.codes < b.codes; });

  // The children of a node: ranges of words that share one more character; a word that ends here comes first.
  std::vector<std::uint16_t> labels;
  std::vector<std::size_t> starts;
  const auto split = [&](const Node& node) {
    labels.clear();
    starts.clear();
    std::size_t i = node.first;
    while (i < node.last && sorted[i].codes.size() == node.depth) ++i;
    for (; i < node.last; ++i)
      if (labels.empty() || sorted[i].codes[node.depth] != labels.back()) {
        labels.push_back(sorted[i].codes[node.depth]);
        starts.push_back(i);
      }
    starts.push_back(node.last);
  };
  const auto ends_here = [&](const Node& node) -> std::uint64_t {
    const Word& word = sorted[node.first];
    return word.codes.size() == node.depth ? std::uint64_t{word.number} << 44 : 0;
  };

  // All nodes below the roots by depth, then by their number of children.
  roots_.assign(std::size_t{unknown} + 1, 0);
  std::vector<Node> nodes;
  split({0, sorted.size(), 0, 0, 0});
  {
    const std::vector<std::uint16_t> firsts = labels;
    const std::vector<std::size_t> begins = starts;
    for (std::size_t k = 0; k < firsts.size(); ++k) nodes.push_back({begins[k], begins[k + 1], 1, 0, firsts[k]});
  }
  const std::size_t root_count = nodes.size();
  std::vector<std::pair<std::size_t, std::size_t>> range(root_count);  // each node's children in `nodes`
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    split(nodes[n]);
    nodes[n].children = labels.size();
    range.resize(nodes.size());
    range[n] = {nodes.size(), nodes.size() + labels.size()};
    const std::size_t depth = nodes[n].depth + 1;
    for (std::size_t k = 0; k < labels.size(); ++k) nodes.push_back({starts[k], starts[k + 1], depth, 0, labels[k]});
  }
  range.resize(nodes.size());
  std::vector<std::uint32_t> by_size;
  if (nodes.size() >= kNone) throw std::length_error("dictionary has too many words");
  for (std::size_t n = 0; n < nodes.size(); ++n)
    if (nodes[n].children > 0) by_size.push_back(static_cast<std::uint32_t>(n));
  std::stable_sort(by_size.begin(), by_size.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return nodes[a].children > nodes[b].children; });

  Places places(alphabet);
  std::vector<std::uint32_t> bases(nodes.size());
  for (const std::uint32_t n : by_size) {
    labels.clear();
    for (std::size_t child = range[n].first; child < range[n].second; ++child)
      labels.push_back(static_cast<std::uint16_t>(nodes[child].unit));
    bases[n] = static_cast<std::uint32_t>(places.take(labels));
  }
  units_.assign(places.size(), 0);
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    const std::uint64_t own = ends_here(nodes[n]) | bases[n];
    if (n < root_count) roots_[nodes[n].unit] = own;
    for (std::size_t child = range[n].first; child < range[n].second; ++child) {
      const std::uint64_t label = nodes[child].unit;
      units_[bases[n] + label] = ends_here(nodes[child]) | label << 28 | bases[child];
    }
  }
  std::sort(hmm_.split.begin(), hmm_.split.end());
}

}  // namespace fastops
