// Runs the functions of csrc/*.cu and their C++ twins on the same random inputs, and compares all bytes
// that they write, and those beside them. Prints a line for each case that differs, and the number of
// cases. The argument chooses the function.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dtypes.h"
#include "merge_source.h"
#include "row_movers.h"
#include "row_sums.h"

using namespace tokenflex;

std::mt19937 draw(1);
int cases = 0, differing = 0;

void expect(bool same, const std::string& name) {
  ++cases;
  if (same) return;
  ++differing;
  std::printf("differs: %s\n", name.c_str());
}

// A block of memory that begins `offset` bytes after a multiple of 64.
struct Bytes {
  std::vector<char> storage;
  char* data;
  size_t size;

  Bytes(size_t size, size_t offset, char fill) : storage(size + 128, fill), size(size) {
    void* start = storage.data();
    size_t space = storage.size();
    data = static_cast<char*>(std::align(64, size + offset, start, space)) + offset;
  }
  void randomise() {
    for (size_t i = 0; i < size; ++i) data[i] = char(draw());
  }
  bool operator==(const Bytes& other) const { return std::memcmp(data, other.data, size) == 0; }
};

void compare_movers() {
  const int64_t rows = 37, table_rows = 100, vision_rows = 50;
  for (const int64_t row_bytes : {4096, 2304, 2302, 1030, 16, 14, 3, 1}) {
    for (const int64_t gap : {0, 1, 16}) {
      for (const auto& [table_at, vision_at, packed_at] :
           {std::array{0, 0, 0}, {1, 0, 0}, {8, 8, 8}, {2, 0, 6}, {4, 4, 0}, {1, 1, 1}, {5, 9, 3}}) {
        Bytes table(table_rows * (row_bytes + gap), table_at, 0);
        Bytes vision(vision_rows * (row_bytes + 2 * gap), vision_at, 0);
        table.randomise(), vision.randomise();
        std::vector<int32_t> source(rows);
        for (auto& entry : source) {
          entry = draw() % 2 ? int32_t(draw() % table_rows) : ~int32_t(draw() % vision_rows);
        }
        const int64_t stride = row_bytes + gap;
        Bytes host(rows * stride, packed_at, 9), device(rows * stride, packed_at, 9);
        PackMap map{{table.data, stride},
                    {vision.data, row_bytes + 2 * gap},
                    {host.data, stride},
                    source.data()};
        move_rows(map, rows, row_bytes, 2);
        map.packed.data = device.data;
        move_rows_cuda(map, rows, row_bytes, 0, 0);
        expect(host == device, "rows of " + std::to_string(row_bytes) + ", gap " +
                                   std::to_string(gap) + ", offsets " + std::to_string(table_at) +
                                   " " + std::to_string(vision_at) + " " +
                                   std::to_string(packed_at));
      }
    }
  }
}

template <class T>
void compare_sums_of(const std::string& dtype, int64_t num, int64_t width, int kind, int64_t gap,
                     int64_t offset) {
  const int64_t num_slots = 50, stride = width + gap, item = sizeof(T);
  std::vector<int32_t> slots(num);
  std::vector<int64_t> rows(num);
  // Short segments; one long one among short ones; one alone.
  for (auto& slot : slots) slot = kind == 2 || (kind == 1 && draw() % 2) ? 3 : draw() % num_slots;
  std::sort(slots.begin(), slots.end());
  for (int64_t i = 0; i < num; ++i) rows[i] = i;
  std::shuffle(rows.begin(), rows.end(), draw);
  Bytes grad(num * stride * item, offset * item, 0);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < num * stride; ++i) {
    reinterpret_cast<T*>(grad.data)[i] = rounded<T>(SumOf<T>(normal(draw)));
  }
  const int64_t tiles = Segments{slots.data(), rows.data(), num}.tiles();
  Bytes host(num_slots * width * item, 0, 0x5a), device(num_slots * width * item, 0, 0x5a);
  const auto job = [&](Bytes& sums, Bytes& partials) {
    return RowSums{{slots.data(), rows.data(), num},
                   {grad.data, stride * item},
                   {sums.data, width * item},
                   {partials.data, int64_t(width * sizeof(SumOf<T>))},
                   width};
  };
  Bytes first(tiles * width * sizeof(SumOf<T>), 0, 0x77);
  Bytes second(tiles * width * sizeof(SumOf<T>), 0, 0x77);
  sum_rows(job(host, first), dtype, 2);
  sum_rows_cuda(job(device, second), dtype, 0, 0);
  expect(host == device, dtype + ", " + std::to_string(num) + " rows of " + std::to_string(width) +
                             ", kind " + std::to_string(kind) + ", gap " + std::to_string(gap));
}

void compare_sums() {
  for (const int kind : {0, 1, 2}) {
    for (const int64_t num : {1, 31, 32, 33, 64, 65, 700}) {
      for (const int64_t width : {1, 7, 8, 40}) {
        compare_sums_of<float>("float32", num, width, kind, 0, 0);
        compare_sums_of<Bfloat16>("bfloat16", num, width, kind, kind * 8, kind == 1);
      }
    }
    compare_sums_of<Half>("float16", 300, 72, kind, 8, 0);
    compare_sums_of<double>("float64", 300, 10, kind, 3, 1);
  }
}

template <class Index>
void compare_merges() {
  for (const int64_t rows : {1, 255, 256, 257, 5000}) {
    std::vector<Index> vision_rows;
    for (int64_t row = 0; row < rows; ++row) {
      if (draw() % 3 == 0) vision_rows.push_back(Index(row));
    }
    std::shuffle(vision_rows.begin(), vision_rows.end(), draw);
    std::vector<int32_t> host(rows, 77), device(rows, 77);
    const auto num_vision = int64_t(vision_rows.size());
    fill_merge_source(vision_rows.data(), num_vision, host.data(), rows);
    fill_merge_source_cuda(vision_rows.data(), num_vision, device.data(), rows, 0, 0);
    expect(host == device, "a merge of " + std::to_string(rows) + " rows");
  }
}

int main(int, char** arguments) {
  const std::string function = arguments[1];
  if (function == "move_rows") compare_movers();
  if (function == "sum_rows") compare_sums();
  if (function == "fill_merge_source") compare_merges<int32_t>(), compare_merges<int64_t>();
  std::printf("%d cases, %d differ\n", cases, differing);
  return differing != 0 || cases == 0;
}
