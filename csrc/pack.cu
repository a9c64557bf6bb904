// Packing on the device: the rows of all fields of a bin in one launch. The definition is m2rl_pack_rows in pack.cpp.
#include <cuda_runtime.h>

#include "ops.h"

namespace {

constexpr int kMaxFields = 16;
constexpr int kThreads = 256;

struct Fields {  // by value: no table has to be copied to the device first
  const char* src[kMaxFields];
  char* dst[kMaxFields];
  int64_t row_bytes[kMaxFields];
  int64_t fill[kMaxFields];
  int32_t shift[kMaxFields];
  int32_t unit[kMaxFields];  // bytes per access: the largest power of two up to 16 that divides the row and both addresses
};

template <class Unit>
__device__ void copy_rows(const Fields& fields, int f, int64_t rows, int64_t n_seqs, const int64_t* src_start,
                          const int64_t* dst_start, const int64_t* lengths, const int64_t* first_row) {
  const int64_t per_row = fields.row_bytes[f] / sizeof(Unit);
  const Unit* src = reinterpret_cast<const Unit*>(fields.src[f]);
  Unit* dst = reinterpret_cast<Unit*>(fields.dst[f]);
  for (int64_t u = blockIdx.x * int64_t{kThreads} + threadIdx.x; u < rows * per_row; u += int64_t{gridDim.x} * kThreads) {
    const int64_t row = u / per_row, column = u - row * per_row;
    int64_t low = 0, high = n_seqs;  // the last sequence whose first row is <= row
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_row[middle] <= row) low = middle;
      else high = middle;
    }
    const int64_t at = row - first_row[low];
    Unit value;
    if (fields.shift[f] && at == lengths[low] - 1) value = *reinterpret_cast<const Unit*>(&fields.fill[f]);
    else value = src[(src_start[low] + at + fields.shift[f]) * per_row + column];
    dst[(dst_start[low] + at) * per_row + column] = value;
  }
}

__global__ void pack_rows(const __grid_constant__ Fields fields, int64_t rows, int64_t n_seqs, const int64_t* src_start,
                          const int64_t* dst_start, const int64_t* lengths, const int64_t* first_row) {
  const int f = blockIdx.y;
  switch (fields.unit[f]) {
    case 16: return copy_rows<uint4>(fields, f, rows, n_seqs, src_start, dst_start, lengths, first_row);
    case 8: return copy_rows<uint2>(fields, f, rows, n_seqs, src_start, dst_start, lengths, first_row);
    case 4: return copy_rows<uint32_t>(fields, f, rows, n_seqs, src_start, dst_start, lengths, first_row);
    case 2: return copy_rows<uint16_t>(fields, f, rows, n_seqs, src_start, dst_start, lengths, first_row);
    default: return copy_rows<uint8_t>(fields, f, rows, n_seqs, src_start, dst_start, lengths, first_row);
  }
}

}  // namespace

int32_t m2rl_pack_rows_cuda(int32_t n_fields, const void* const* src, void* const* dst, const int64_t* row_bytes,
                            const int32_t* shift, const int64_t* fill, int64_t rows, int64_t n_seqs, const int64_t* src_start,
                            const int64_t* dst_start, const int64_t* lengths, const int64_t* first_row, void* stream) {
  if (n_fields > kMaxFields) return cudaErrorInvalidValue;
  if (rows == 0 || n_fields == 0) return cudaSuccess;
  Fields fields = {};
  int64_t most = 0;
  for (int32_t f = 0; f < n_fields; ++f) {
    fields.src[f] = static_cast<const char*>(src[f]);
    fields.dst[f] = static_cast<char*>(dst[f]);
    fields.row_bytes[f] = row_bytes[f];
    fields.shift[f] = shift[f];
    fields.fill[f] = fill[f];
    int32_t unit = 16;
    const uint64_t bits = reinterpret_cast<uint64_t>(src[f]) | reinterpret_cast<uint64_t>(dst[f]) | static_cast<uint64_t>(row_bytes[f]);
    while (bits % unit) unit /= 2;
    fields.unit[f] = unit;
    most = row_bytes[f] / unit > most ? row_bytes[f] / unit : most;
  }
  const int64_t blocks = (rows * most + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks < 4096 ? blocks : 4096), n_fields);
  pack_rows<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(fields, rows, n_seqs, src_start, dst_start, lengths, first_row);
  return cudaGetLastError();
}
