// The DeepSeek-V2 forward pass on a CPU, read top to bottom: vectors, tiles, matrices, threads, attention, experts, model, C ABI.
//
// Owns: packed weights, a team of threads, scratch memory. Knows nothing of requests, files or Python: it gets plain pointers.
// This file is compiled once for each instruction set (build.py); nothing in it depends on torch.
//
// Letters in shapes: T rows (new tokens of all spans), S tokens of context, D hidden size, H heads, R latent rank, N/P/V the nope,
// rope and value head dims, E routed experts, K experts a token, I the inner size of an expert.
// Every matrix product here is a tile: a few rows of activations times a block of 32 outputs, summed over the whole inner dimension
// in registers. Weights are packed for it at load, keys and values while they are read, so decode and prefill share all of it.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 3;  // 12 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 3;  // 24 of 32
#else
constexpr int LANES = 4, TILE_ROWS = 1;  // 8 of 16
#endif
#if defined(__AVX512BF16__)
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif

constexpr int BLOCK = 32;             // outputs of one tile
constexpr int PARTS = BLOCK / LANES;  // vectors that hold them

using bf16 = uint16_t;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Vector>
inline Vector load(const void* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline float to_float(bf16 x) { return bits<float>(uint32_t(x) << 16); }
inline float to_float(float x) { return x; }
inline bf16 to_bf16(float x) {  // rounds to the nearest, ties to even
    uint32_t u = bits<uint32_t>(x);
    return bf16((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// e^x to 2 ulp for x <= 0 and for moderate positive x; written so that compilers vectorise loops over it.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
    int32_t whole = bits<int32_t>(shifted) - 0x4b400000;
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits<float>((whole + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// ------------------------------------------------------------------------------------------------------------------ tiles
// A format says how weights and activations lie and multiply. STEP neighbours along the inner dimension lie together, so that one
// 32-bit activation (a float, a pair of bf16, a pair of int16) meets one vector of weights: [step][32 outputs][STEP].

struct FloatFormat {
    using Weight = float;
    using Activation = float;
    using Sum = Floats;
    using Decoded = Floats;
    static constexpr int STEP = 1;
    static Decoded decode(const Weight* w) { return load<Floats>(w); }
    static Sum add(Sum sum, Decoded w, const Activation* a) { return sum + w * *a; }
};

struct Bf16TimesFloat {  // exact in the activations: for single rows, where reading the weights is all that counts
    using Weight = bf16;
    using Activation = float;
    using Sum = Floats;
    struct Decoded {
        Floats even, odd;
    };
    static constexpr int STEP = 2;
    static Decoded decode(const Weight* w) {
        Words pair = load<Words>(w);
        return {bits<Floats>(pair << 16), bits<Floats>(pair & 0xffff0000u)};
    }
    static Sum add(Sum sum, Decoded w, const Activation* a) { return sum + w.even * a[0] + w.odd * a[1]; }
};

#if defined(__AVX512BF16__)
struct Bf16Format {
    using Weight = bf16;
    using Activation = bf16;
    using Sum = Floats;
    using Decoded = __m512i;
    static constexpr int STEP = 2;
    static Decoded decode(const Weight* w) { return _mm512_loadu_si512(w); }
    static Sum add(Sum sum, Decoded w, const Activation* a) {
        return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(load<int32_t>(a)));
    }
};
#else
using Bf16Format = Bf16TimesFloat;  // never asked for: activations stay float32 (see Form)
#endif

struct ByteFormat {  // int8 weights times int16 activations, which lose next to nothing against float32
    using Weight = int8_t;
    using Activation = int16_t;
    using Sum = Ints;
    static constexpr int STEP = 2;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    using Decoded = __m512i;
    static Decoded decode(const Weight* w) { return _mm512_cvtepi8_epi16(load<__m256i>(w)); }
    static Sum add(Sum sum, Decoded w, const Activation* a) {
        return (Sum)_mm512_dpwssd_epi32((__m512i)sum, w, _mm512_set1_epi32(load<int32_t>(a)));
    }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    using Decoded = __m256i;
    static Decoded decode(const Weight* w) { return _mm256_cvtepi8_epi16(load<__m128i>(w)); }
    static Sum add(Sum sum, Decoded w, const Activation* a) {
        return sum + (Sum)_mm256_madd_epi16(w, _mm256_set1_epi32(load<int32_t>(a)));
    }
#else
    struct Decoded {
        Ints even, odd;
    };
    static Decoded decode(const Weight* w) {
        Decoded d;
        for (int lane = 0; lane < LANES; lane++) d.even[lane] = w[2 * lane], d.odd[lane] = w[2 * lane + 1];
        return d;
    }
    static Sum add(Sum sum, Decoded w, const Activation* a) { return sum + w.even * int32_t(a[0]) + w.odd * int32_t(a[1]); }
#endif
};

// c [ROWS][32] = a [ROWS][steps * STEP] times w [steps][32][STEP]. Few rows leave registers for several chains of sums, which hide
// the latency of the multiplications.
template <class Format, int ROWS>
void tile(const void* a_start, size_t a_stride, const void* w_start, int steps, float* c) {
    constexpr int STEP = Format::STEP;
    constexpr int CHAINS = LANES < 16 ? 1 : ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
    auto a = static_cast<const typename Format::Activation*>(a_start);
    auto w = static_cast<const typename Format::Weight*>(w_start);
    typename Format::Sum sum[CHAINS][ROWS][PARTS] = {};
    auto step = [&](int s, auto& sums) __attribute__((always_inline)) {
        typename Format::Decoded decoded[PARTS];
#pragma GCC unroll 8
        for (int p = 0; p < PARTS; p++) decoded[p] = Format::decode(w + (size_t(s) * BLOCK + p * LANES) * STEP);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int p = 0; p < PARTS; p++) sums[r][p] = Format::add(sums[r][p], decoded[p], a + r * a_stride + size_t(s) * STEP);
    };
    int s = 0;
    for (; s + CHAINS <= steps; s += CHAINS)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) step(s + chain, sum[chain]);
    for (; s < steps; s++) step(s, sum[0]);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PARTS; p++) {
            for (int chain = 1; chain < CHAINS; chain++) sum[0][r][p] += sum[chain][r][p];
            Floats out = __builtin_convertvector(sum[0][r][p], Floats);
            std::memcpy(c + r * BLOCK + p * LANES, &out, sizeof out);
        }
}

// int4 weights: of each group of 64 columns first the 32 outputs' scales (bf16), then two weights a byte, the first of a pair in the
// low bits, 8 more than they are. Sums are exact integers within a group and float32 between groups.
constexpr int GROUP_STEPS = 32, GROUP_BYTES = BLOCK * 2 + GROUP_STEPS * BLOCK;

inline ByteFormat::Decoded unpacked(const uint8_t* pairs) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    __m512i wide = _mm512_cvtepu8_epi32(load<__m128i>(pairs));
    wide = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)), _mm512_set1_epi32(0x000f000f));
    return _mm512_sub_epi16(wide, _mm512_set1_epi16(8));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs)));
    wide = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi32(wide, 12)), _mm256_set1_epi32(0x000f000f));
    return _mm256_sub_epi16(wide, _mm256_set1_epi16(8));
#else
    ByteFormat::Decoded d;
    for (int lane = 0; lane < LANES; lane++) d.even[lane] = (pairs[lane] & 15) - 8, d.odd[lane] = (pairs[lane] >> 4) - 8;
    return d;
#endif
}

// As `tile`, for int4 weights.
template <int ROWS>
void nibble_tile(const void* a_start, size_t a_stride, const void* w_start, int steps, float* c) {
    auto a = static_cast<const int16_t*>(a_start);
    auto w = static_cast<const uint8_t*>(w_start);
    Floats total[ROWS][PARTS] = {};
    for (int begin = 0; begin < steps; begin += GROUP_STEPS, w += GROUP_BYTES) {
        Ints sum[ROWS][PARTS] = {};
        for (int s = begin; s < std::min(steps, begin + GROUP_STEPS); s++) {
            ByteFormat::Decoded decoded[PARTS];
#pragma GCC unroll 8
            for (int p = 0; p < PARTS; p++) decoded[p] = unpacked(w + BLOCK * 2 + (s - begin) * BLOCK + p * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int p = 0; p < PARTS; p++) sum[r][p] = ByteFormat::add(sum[r][p], decoded[p], a + r * a_stride + size_t(s) * 2);
        }
        for (int p = 0; p < PARTS; p++) {
            Words scale;
            for (int lane = 0; lane < LANES; lane++) scale[lane] = uint32_t(load<bf16>(w + (p * LANES + lane) * 2)) << 16;
            for (int r = 0; r < ROWS; r++) total[r][p] += __builtin_convertvector(sum[r][p], Floats) * bits<Floats>(scale);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PARTS; p++) std::memcpy(c + r * BLOCK + p * LANES, &total[r][p], sizeof(Floats));
}

using Tile = void (*)(const void*, size_t, const void*, int, float*);
using Tiles = std::array<Tile, TILE_ROWS>;

template <class Format, size_t... ROWS>
constexpr Tiles tiles_of(std::index_sequence<ROWS...>) {
    return {tile<Format, int(ROWS) + 1>...};
}
template <size_t... ROWS>
constexpr Tiles nibble_tiles_of(std::index_sequence<ROWS...>) {
    return {nibble_tile<int(ROWS) + 1>...};
}
constexpr Tiles NIBBLE_TILES = nibble_tiles_of(std::make_index_sequence<TILE_ROWS>());
template <class Format>
constexpr Tiles TILES = tiles_of<Format>(std::make_index_sequence<TILE_ROWS>());

// --------------------------------------------------------------------------------------------------------------- matrices

// Memory aligned to a cache line, in large pages where there is much of it; grows, never shrinks, keeps nothing when it grows.
template <class T>
class Buffer {
    T* start = nullptr;
    size_t capacity = 0;

  public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(start, other.start);
        std::swap(capacity, other.capacity);
        return *this;
    }
    ~Buffer() { std::free(start); }
    T* at_least(size_t count) {
        if (count > capacity) {
            std::free(start);
            start = nullptr, capacity = 0;
            size_t large = size_t(2) << 20, bytes = count * sizeof(T);
            size_t aligned = bytes >= large ? large : 64;
            bytes = round_up(bytes, aligned);
            void* memory = nullptr;
            if (posix_memalign(&memory, aligned, bytes)) throw std::bad_alloc();
#if defined(__linux__)
            if (aligned == large) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
            start = static_cast<T*>(memory), capacity = bytes / sizeof(T);
        }
        return start;
    }
    T* get() const { return start; }
};

enum class Kind : int { f32 = 0, bf16 = 1, i8 = 2, i4 = 3 };  // of weights
enum class Form : int { f32 = 0, bf16 = 1, i16 = 2 };  // of activations

inline size_t size_of(Form form) { return form == Form::f32 ? 4 : 2; }
inline int step_of(Kind kind) { return kind == Kind::f32 ? 1 : 2; }
inline size_t size_of(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::bf16 ? 2 : 1; }

// Activations are rounded to bf16 only where that buys speed: with many rows, on a processor that multiplies bf16.
inline Form form_for(Kind kind, int rows) {
    if (kind == Kind::i8 || kind == Kind::i4) return Form::i16;
    return kind == Kind::bf16 && rows > 1 && HAS_BF16 ? Form::bf16 : Form::f32;
}

// Activations: rows of `cols` numbers, `stride` numbers apart; for int16, `scale` turns each row back into what it was.
struct Rows {
    Form form = Form::f32;
    const void* data = nullptr;
    size_t stride = 0;
    const float* scale = nullptr;
    const void* at(size_t row) const { return static_cast<const char*>(data) + row * stride * size_of(form); }
};

// Packed blocks of 32 outputs: a weight matrix, or the keys or values of a stretch of context.
struct Panels {
    Kind kind = Kind::f32;
    int steps = 0;  // of the inner dimension
    const void* data = nullptr;
    const float* scale = nullptr;  // of each output, when int8
    size_t block_bytes() const {
        if (kind == Kind::i4) return size_t(ceil_div(steps, GROUP_STEPS)) * GROUP_BYTES;
        return size_t(steps) * BLOCK * step_of(kind) * size_of(kind);
    }
    const void* at(size_t block) const { return static_cast<const char*>(data) + block * block_bytes(); }
};

// Gives `use(row, values [32])` for every row in [first, first + count): the outputs of one block.
template <class Use>
inline void multiply(const Panels& w, size_t block, const Rows& a, int64_t first, int64_t count, Use use) {
    if (count <= 0) return;
    const Tiles& tiles = w.kind == Kind::f32    ? TILES<FloatFormat>
                         : w.kind == Kind::i8   ? TILES<ByteFormat>
                         : w.kind == Kind::i4   ? NIBBLE_TILES
                         : a.form == Form::bf16 ? TILES<Bf16Format>
                                                : TILES<Bf16TimesFloat>;
    alignas(64) float c[TILE_ROWS * BLOCK];
    int64_t height = ceil_div(count, ceil_div(count, TILE_ROWS));  // tiles of about the same height
    for (int64_t row = first; row < first + count; row += height) {
        int64_t rows = std::min(height, first + count - row);
        tiles[rows - 1](a.at(row), a.stride, w.at(block), w.steps, c);
        for (int64_t r = 0; r < rows; r++) {
            float* values = c + r * BLOCK;
            if (w.kind == Kind::i8) {
                const float* scale = w.scale + block * BLOCK;
                float row_scale = a.scale[row + r];
                for (int i = 0; i < BLOCK; i++) values[i] *= scale[i] * row_scale;
            } else if (w.kind == Kind::i4) {
                for (int i = 0; i < BLOCK; i++) values[i] *= a.scale[row + r];
            }
            use(row + r, values);
        }
    }
}

// A weight matrix [rows, cols], packed. Gate and up projections share one matrix: each block has 16 rows of either, so that a tile
// has both halves of an inner value.
struct Matrix : Panels {
    int64_t rows = 0, cols = 0, blocks = 0;
    Buffer<char> memory;
    Buffer<float> scales;

    void shape(Kind kind_, int64_t rows_, int64_t cols_, int lanes) {  // `lanes`: of a block, for one part of rows
        kind = kind_, rows = rows_, cols = cols_;
        steps = int(ceil_div(cols, step_of(kind)));
        blocks = ceil_div(rows, lanes);
        data = std::memset(memory.at_least(blocks * block_bytes()), 0, blocks * block_bytes());
        if (kind == Kind::i8) scale = static_cast<float*>(std::memset(scales.at_least(blocks * BLOCK), 0, blocks * BLOCK * 4));
    }

    // Puts row `row`, `cols` numbers that lie `stride` apart, into lane `lane` of `block`.
    template <class T>
    void pack_row(const T* row, int64_t stride, int64_t block, int lane) {
        if (kind == Kind::i4) return pack_nibbles(row, stride, block, lane);
        int step = step_of(kind);
        size_t start = size_t(block) * steps * BLOCK * step + lane * step;
        auto slot = [&](int64_t col) { return start + size_t(col / step) * BLOCK * step + col % step; };
        if (kind == Kind::f32) {
            auto out = reinterpret_cast<float*>(memory.get());
            for (int64_t col = 0; col < cols; col++) out[slot(col)] = to_float(row[col * stride]);
        } else if (kind == Kind::bf16) {
            auto out = reinterpret_cast<bf16*>(memory.get());
            for (int64_t col = 0; col < cols; col++) out[slot(col)] = to_bf16(to_float(row[col * stride]));
        } else {
            float largest = 0;
            for (int64_t col = 0; col < cols; col++) largest = std::max(largest, std::fabs(to_float(row[col * stride])));
            float to_byte = largest > 0 ? 127 / largest : 0;
            auto out = reinterpret_cast<int8_t*>(memory.get());
            for (int64_t col = 0; col < cols; col++) out[slot(col)] = int8_t(std::lrint(to_float(row[col * stride]) * to_byte));
            scales.get()[block * BLOCK + lane] = largest / 127;
        }
    }

    // As experts.py does it: of some scales a group, that with the least squared error.
    template <class T>
    void pack_nibbles(const T* row, int64_t stride, int64_t block, int lane) {
        auto group = reinterpret_cast<uint8_t*>(memory.get()) + block * block_bytes();
        for (int64_t begin = 0; begin < cols; begin += 2 * GROUP_STEPS, group += GROUP_BYTES) {
            float values[2 * GROUP_STEPS] = {}, codes[2 * GROUP_STEPS], best[2 * GROUP_STEPS] = {};
            int64_t count = std::min<int64_t>(2 * GROUP_STEPS, cols - begin);
            for (int64_t i = 0; i < count; i++) values[i] = to_float(row[(begin + i) * stride]);
            float extreme = 0, least = -1;
            for (float value : values)
                if (std::fabs(value) > std::fabs(extreme)) extreme = value;
            bf16 scale = 0;
            for (float share : {1.0f, 0.92f, 0.84f, 0.76f}) {
                bf16 tried = to_bf16(extreme * share / -8);
                float step = to_float(tried), inverse = step != 0 ? 1 / step : 0, error = 0;
                for (int i = 0; i < 2 * GROUP_STEPS; i++) {
                    codes[i] = std::min(std::max(std::nearbyint(values[i] * inverse), -8.0f), 7.0f);
                    float off = codes[i] * step - values[i];
                    error += off * off;
                }
                if (least < 0 || error < least) least = error, scale = tried, std::memcpy(best, codes, sizeof best);
            }
            std::memcpy(group + lane * 2, &scale, 2);
            for (int i = 0; i < GROUP_STEPS; i++)
                group[BLOCK * 2 + i * BLOCK + lane] = uint8_t(int(best[2 * i]) + 8) | uint8_t((int(best[2 * i + 1]) + 8) << 4);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------- threads
// One caller and its helpers share the tasks of a job through one atomic counter, so a helper that the system has put aside delays
// nothing but the task it holds. Helpers spin while a step runs and for a moment after it, then sleep.

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team {
    static constexpr int SPINS_BEFORE_SLEEP = 4000, SPINS_BEFORE_YIELD = 2000;
    alignas(64) std::atomic<uint64_t> ticket{0};  // tasks of the job << 32 | the next task
    alignas(64) std::atomic<int64_t> done{0};
    void (*call)(void*, int64_t, int) = nullptr;  // valid as long as a task of the job is not done
    void* context = nullptr;
    std::atomic<bool> active{false};
    bool stopping = false;
    int limit = 1;  // threads that take part, the caller included
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> helpers;

    bool take_one(int thread) {
        uint64_t seen = ticket.load(std::memory_order_relaxed);
        if (uint32_t(seen) >= seen >> 32) return false;
        uint64_t mine = ticket.fetch_add(1, std::memory_order_acq_rel);
        if (uint32_t(mine) >= mine >> 32) return false;
        call(context, uint32_t(mine), thread);
        done.fetch_add(1, std::memory_order_release);
        return true;
    }

    void help(int thread) {
        for (;;) {
            for (int idle = 0; idle < SPINS_BEFORE_SLEEP; idle++) {
                if (active.load(std::memory_order_relaxed) && thread < limit) {
                    if (take_one(thread)) idle = 0;
                    else if (idle >= SPINS_BEFORE_YIELD) std::this_thread::yield(), idle = 0;
                }
                pause();
            }
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return stopping || (active.load() && thread < limit); });
            if (stopping) return;
        }
    }

  public:
    explicit Team(int threads) {
        for (int thread = 1; thread < threads; thread++) helpers.emplace_back([this, thread] { help(thread); });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true, active = false;
        }
        wake.notify_all();
        for (auto& helper : helpers) helper.join();
    }
    int size() const { return limit; }
    int capacity() const { return int(helpers.size()) + 1; }
    void resize(int threads) {
        std::lock_guard<std::mutex> lock(mutex);
        limit = threads;
    }
    void begin() {
        if (limit == 1) return;
        {
            std::lock_guard<std::mutex> lock(mutex);
            active = true;
        }
        wake.notify_all();
    }
    void end() { active = false; }

    // Runs work(task, thread) for every task in [0, tasks) and returns when all are done.
    template <class Work>
    void run(int64_t tasks, Work work) {
        if (limit == 1 || tasks <= 1) {
            for (int64_t task = 0; task < tasks; task++) work(task, 0);
            return;
        }
        call = [](void* w, int64_t task, int thread) { (*static_cast<Work*>(w))(task, thread); };
        context = &work;
        done.store(0, std::memory_order_relaxed);
        ticket.store(uint64_t(tasks) << 32, std::memory_order_release);
        while (take_one(0)) {
        }
        for (int spins = 0; done.load(std::memory_order_acquire) < tasks; spins++) {
            pause();
            if (spins > SPINS_BEFORE_YIELD) std::this_thread::yield();
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------ model

struct Config {  // mirrored by library.Config
    int32_t vocab, hidden, dense_inner, expert_inner, layers, dense_layers, heads, q_rank, latent, nope, rope, value;
    int32_t experts, shared, top_k, groups, top_groups, kind;
    float routed_scale, eps, softmax_scale, rope_magnitude;
};

struct Pool {  // mirrored by library.Pool
    void* c_kv;           // [layers, slots, R]
    void* k_pe;           // [layers, slots, P]
    int64_t slots;
    int32_t is_bf16;
};

struct Sequence {  // mirrored by library.Sequence
    const int32_t* pages;
    int32_t tokens, context;
};

constexpr int PAGE = 16;      // pages.PAGE_TOKENS
constexpr int STRETCH = 128;  // tokens of context that one round of attention takes
static_assert(STRETCH % BLOCK == 0 && STRETCH % PAGE == 0);

enum class Attention : int { by_cost = 0, absorbed = 1, expanded = 2 };

struct Mlp {
    Matrix gate_up, down;  // [2I, D] by 16 and 16, [D, I]
};

struct Layer {
    std::vector<float> input_norm, q_norm, latent_norm, post_norm;
    Matrix q, q_b, kv_a, o, gate;                 // `q` is q_a_proj when there is a q_b
    std::vector<Matrix> key_up, key_absorb, value_up;  // of each head: W_UK [N, R], its transpose [R, N], W_UV [V, R]
    std::vector<Mlp> experts;
    Mlp shared;  // the shared experts, or the whole of a dense layer
};

// A run of rows of one sequence, with what attention needs to know of it.
struct Span {
    const int32_t* pages;
    int64_t first, count;  // rows
    int64_t context;       // tokens visible to its last row
};

// What one thread needs for itself while it attends.
struct Workspace {
    Buffer<uint32_t> staged_latent, staged_rope, keys, values;
    Buffer<float> scores, expanded;
    Buffer<char> shares;
};

// Running softmax of one query row over its stretches (arXiv 1805.02867): out is sum(e^(score - max) * value).
struct Running {
    float max, sum;
};

// One task of absorbed attention: some (row, head) pairs of a span against some stretches of its context.
struct Work {
    const Span* span;
    int64_t first, count;  // pairs, counted from the span's first
    int64_t begin, end;    // stretches
};

struct Choice {
    int32_t expert;
    float weight;
};

struct Formed {
    Buffer<char> data;
    Buffer<float> scale;
};

struct Model {
    Config config;
    std::vector<float> frequencies, final_norm;
    std::vector<Layer> layers;
    Matrix head;
    Buffer<char> embedding;  // [vocab, D], float32 or bf16
    Team team;
    std::vector<Workspace> workspaces;
    Attention attention_mode = Attention::by_cost;

    int64_t weight_bytes = 0;

    Buffer<float> x_, turns_, normed_, q_, q_low_, kv_, mixed_, heads_out_, partial_, inner_, shared_inner_, affinity_, sorted_scale_;
    Buffer<Running> running_;
    Buffer<char> queries_, keys_, values_, sorted_;
    Formed a_, b_;
    std::vector<int64_t> position;  // of each row
    std::vector<int32_t> wanted;    // rows, ascending
    std::vector<Span> spans;
    std::vector<Work> works;
    std::vector<Choice> choices;           // [T, K]
    std::vector<int32_t> sorted, start;    // choices by expert, and where each expert's begin
    std::vector<int32_t> active;           // experts that someone chose

    Model(const Config& c, const float* f, int threads)
        : config(c), frequencies(f, f + c.rope / 2), layers(c.layers), team(threads), workspaces(threads) {
        for (auto& layer : layers) {
            layer.key_up.resize(c.heads), layer.key_absorb.resize(c.heads), layer.value_up.resize(c.heads);
            if (&layer - layers.data() >= c.dense_layers) layer.experts.resize(c.experts);
        }
    }

    Kind kind() const { return Kind(config.kind); }
    bool wide_embedding() const { return kind() == Kind::f32; }

    // ---- small pieces

    // Rows of float32 [count, cols], `stride` apart, in the form that suits weights of `kind`.
    Rows formed(Formed& memory, Kind kind, float* rows, int64_t count, int64_t cols, int64_t stride, int64_t tokens) {
        Form form = form_for(kind, int(tokens));
        if (form == Form::f32) {
            if (cols % 2)  // weights in pairs read one number more
                for (int64_t r = 0; r < count; r++) rows[r * stride + cols] = 0;
            return {form, rows, size_t(stride), nullptr};
        }
        auto out = reinterpret_cast<uint16_t*>(memory.data.at_least(count * stride * 2));
        float* scale = memory.scale.at_least(count);
        // The largest int16 for which a sum over all columns cannot leave int32; int4 weights are summed in groups.
        float limit = kind == Kind::i4 ? 32767 : float(std::min<int64_t>(32767, INT32_MAX / (127 * (cols + 1))));
        auto convert = [&](int64_t r) {
            const float* from = rows + r * stride;
            uint16_t* to = out + r * stride;
            if (form == Form::bf16) {
                for (int64_t i = 0; i < cols; i++) to[i] = to_bf16(from[i]);
            } else {
                float largest = 0;
#pragma omp simd reduction(max : largest)
                for (int64_t i = 0; i < cols; i++) largest = std::max(largest, std::fabs(from[i]));
                float factor = largest > 0 ? limit / largest : 0;
                for (int64_t i = 0; i < cols; i++) to[i] = uint16_t(int16_t(int32_t(std::nearbyint(from[i] * factor))));
                scale[r] = largest / limit;
            }
            if (cols % 2) to[cols] = 0;
        };
        int64_t together = std::max<int64_t>(1, 16384 / cols);
        team.run(ceil_div(count, together), [&](int64_t task, int) {
            for (int64_t r = task * together; r < std::min(count, (task + 1) * together); r++) convert(r);
        });
        return {form, out, size_t(stride), scale};
    }

    void normalise(const float* from, const std::vector<float>& weight, float* to) const {
        float squares = 0;
        int64_t n = int64_t(weight.size());
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; i++) squares += from[i] * from[i];
        float factor = 1 / std::sqrt(squares / float(n) + config.eps);
        for (int64_t i = 0; i < n; i++) to[i] = from[i] * factor * weight[i];
    }

    // Tasks of a product: a few blocks each, and with many rows also a share of the rows.
    struct Split {
        int64_t blocks_each, rows_each, by_blocks, by_rows;
        int64_t tasks() const { return by_blocks * by_rows; }
    };
    Split split(const Matrix& w, int64_t rows) const {
        int64_t each = std::max<int64_t>(1, int64_t(16384 / w.block_bytes()));
        each = rows > 8 ? 1 : std::min(each, std::max<int64_t>(1, w.blocks / (3 * team.size())));
        int64_t rows_each = 16 * TILE_ROWS;
        return {each, rows_each, ceil_div(w.blocks, each), ceil_div(rows, rows_each)};
    }
    template <class Use>
    static void run_share(const Split& s, int64_t task, const Matrix& w, const Rows& a, int64_t first, int64_t rows, Use use) {
        int64_t b = task % s.by_blocks * s.blocks_each, r = task / s.by_blocks * s.rows_each;
        for (int64_t block = b; block < std::min(w.blocks, b + s.blocks_each); block++)
            multiply(w, block, a, first + r, std::min(s.rows_each, rows - r), [&](int64_t row, float* c) { use(row, block, c); });
    }

    struct Target {
        const Matrix* w;
        float* out;
        int64_t stride;
    };
    // Several matrices applied to the same rows, in one job.
    template <size_t n>
    void project(const Rows& a, int64_t rows, const std::array<Target, n>& targets) {
        std::array<Split, n> splits;
        int64_t tasks = 0;
        for (size_t i = 0; i < n; i++) splits[i] = split(*targets[i].w, rows), tasks += splits[i].tasks();
        team.run(tasks, [&](int64_t task, int) {
            size_t i = 0;
            for (; task >= splits[i].tasks(); i++) task -= splits[i].tasks();
            run_share(splits[i], task, *targets[i].w, a, 0, rows, [&](int64_t row, int64_t block, const float* c) {
                std::memcpy(targets[i].out + row * targets[i].stride + block * BLOCK, c, BLOCK * sizeof(float));
            });
        });
    }

    void project_onto(const Matrix& w, const Rows& a, int64_t rows, float* out, int64_t stride) {
        Split s = split(w, rows);
        team.run(s.tasks(), [&](int64_t task, int) {
            run_share(s, task, w, a, 0, rows, [&](int64_t row, int64_t block, const float* c) {
                float* to = out + row * stride + block * BLOCK;
                for (int i = 0; i < BLOCK; i++) to[i] += c[i];
            });
        });
    }

    // Cosines and sines of every row's position [rows, P], once a step: all layers and heads turn by the same angles.
    void find_turns() {
        const int64_t rows = int64_t(position.size()), P = config.rope;
        float* turns = turns_.at_least(rows * P);
        team.run(ceil_div(rows, 16), [&](int64_t task, int) {
            for (int64_t row = task * 16; row < std::min(rows, (task + 1) * 16); row++)
                for (int64_t i = 0; i < P / 2; i++) {
                    float angle = float(position[row]) * frequencies[i], *to = turns + row * P + 2 * i;
                    to[0] = std::cos(angle) * config.rope_magnitude, to[1] = std::sin(angle) * config.rope_magnitude;
                }
        });
    }

    void rotate(float* pairs, int64_t row) const {
        const float* turn = turns_.get() + row * config.rope;
        for (int i = 0; i < config.rope; i += 2) {
            float a = pairs[i], b = pairs[i + 1];
            pairs[i] = a * turn[i] - b * turn[i + 1], pairs[i + 1] = a * turn[i + 1] + b * turn[i];
        }
    }

    // ---- attention (arXiv 2405.04434, section 2.1)

    Form attention_form(const Pool& pool) const { return pool.is_bf16 && HAS_BF16 ? Form::bf16 : Form::f32; }
    static Kind kind_of(Form form) { return form == Form::bf16 ? Kind::bf16 : Kind::f32; }
    static int64_t words(Form form, int64_t numbers) { return form == Form::bf16 ? numbers / 2 : numbers; }
    int64_t latent_width() const { return round_up(config.latent, 2); }
    int64_t nope_width() const { return round_up(config.nope, 2); }

    // Rows of numbers as 32-bit words: floats, or pairs of bf16.
    struct WordRows {
        const uint32_t* start;
        size_t stride;
        const uint32_t* at(int64_t row) const { return start + row * stride; }
    };

    // `tokens` rows of a page in `form`, as they lie where that is possible, else copied (and the rest of the 16 zero).
    static WordRows rows_of_page(const void* pool, bool is_bf16, int64_t slot, int64_t cols, int64_t tokens, Form form, uint32_t* stage) {
        size_t stride = words(form, round_up(cols, 2));
        if (is_bf16 == (form == Form::bf16) && tokens == PAGE && cols % 2 == 0)
            return {static_cast<const uint32_t*>(pool) + slot * stride, stride};
        std::memset(stage, 0, PAGE * stride * 4);
        for (int64_t t = 0; t < tokens; t++) {
            auto half = static_cast<const bf16*>(pool) + (slot + t) * cols;
            auto full = static_cast<const float*>(pool) + (slot + t) * cols;
            if (form == Form::bf16) {
                auto to = reinterpret_cast<bf16*>(stage + t * stride);
                for (int64_t i = 0; i < cols; i++) to[i] = is_bf16 ? half[i] : to_bf16(full[i]);
            } else {
                auto to = reinterpret_cast<float*>(stage + t * stride);
                for (int64_t i = 0; i < cols; i++) to[i] = is_bf16 ? to_float(half[i]) : full[i];
            }
        }
        return {stage, stride};
    }
    WordRows latents(const Pool& pool, int64_t layer, int32_t page, int64_t tokens, Form form, uint32_t* stage) const {
        return rows_of_page(pool.c_kv, pool.is_bf16, layer * pool.slots + int64_t(page) * PAGE, config.latent, tokens, form, stage);
    }
    WordRows rope_keys(const Pool& pool, int64_t layer, int32_t page, int64_t tokens, Form form, uint32_t* stage) const {
        return rows_of_page(pool.k_pe, pool.is_bf16, layer * pool.slots + int64_t(page) * PAGE, config.rope, tokens, form, stage);
    }

    // Keys of a page become 16 of the 32 lanes of a block: rows [16][count] -> [count][32].
    static void pack_keys(WordRows rows, int64_t count, uint32_t* to) {
        int64_t w = 0;
#if defined(__AVX512F__)
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (; w + 16 <= count; w += 16) {
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows.at(i) + w);
            auto weave = [&](const __m512i* in, __m512i* out) {  // four of these transpose 16 x 16
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    out[2 * i] = _mm512_permutex2var_epi32(in[i], low, in[i + 8]);
                    out[2 * i + 1] = _mm512_permutex2var_epi32(in[i], high, in[i + 8]);
                }
            };
            weave(a, b), weave(b, a), weave(a, b), weave(b, a);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (w + i) * BLOCK, a[i]);
        }
#endif
        for (; w < count; w++)
            for (int i = 0; i < PAGE; i++) to[w * BLOCK + i] = rows.at(i)[w];
    }

    // Values of a page become 16 tokens of the inner dimension: `to` [block of values][tokens / STEP][32][STEP], at token `at`.
    static void pack_values(WordRows rows, int64_t count, Form form, int64_t at, int64_t tokens, uint32_t* to) {
        int64_t step = form == Form::bf16 ? 2 : 1, steps = tokens / step;
        for (int64_t v = 0; v < count; v += BLOCK) {
            int64_t lanes = std::min<int64_t>(BLOCK, count - v);
            uint32_t* block = to + (v / BLOCK * steps + at / step) * BLOCK;
            if (lanes < BLOCK) std::memset(block, 0, PAGE / step * BLOCK * 4);
            for (int t = 0; t < PAGE; t += int(step), block += BLOCK) {
                if (form == Form::bf16) {
                    auto a = reinterpret_cast<const bf16*>(rows.at(t)) + v, b = reinterpret_cast<const bf16*>(rows.at(t + 1)) + v;
                    if (lanes == BLOCK)
                        for (int i = 0; i < BLOCK; i++) block[i] = a[i] | uint32_t(b[i]) << 16;
                    else
                        for (int i = 0; i < lanes; i++) block[i] = a[i] | uint32_t(b[i]) << 16;
                } else {
                    std::memcpy(block, rows.at(t) + v, lanes * 4);
                }
            }
        }
    }

    // One stretch of context, packed: `tokens` of it are there, `padded` (a multiple of 16) are computed.
    struct Stretch {
        Panels keys, values;
        int64_t start, tokens, padded;
    };

    // Query rows [first, first + count) against a stretch; row i sees the tokens before visible(i). Goes on from `running` and `out`.
    template <class Visible>
    static void attend(const Rows& q, int64_t first, int64_t count, const Stretch& s, Visible visible, Running* running, float* out,
                       int64_t out_stride, Workspace& own) {
        float* scores = own.scores.at_least(count * STRETCH);
        for (int64_t block = 0; block < ceil_div(s.tokens, BLOCK); block++)
            multiply(s.keys, block, q, first, count, [&](int64_t row, const float* c) {
                std::memcpy(scores + (row - first) * STRETCH + block * BLOCK, c, BLOCK * sizeof(float));
            });
        Form form = q.form;
        char* shares = form == Form::bf16 ? own.shares.at_least(count * STRETCH * 2) : reinterpret_cast<char*>(scores);
        for (int64_t row = 0; row < count; row++) {
            float* score = scores + row * STRETCH;
            int seen = int(std::clamp<int64_t>(visible(first + row) - s.start, 0, s.tokens));
            float top = running[row].max;
#pragma omp simd reduction(max : top)
            for (int i = 0; i < seen; i++) top = std::max(top, score[i]);
            if (top > running[row].max) {
                float factor = exponential(running[row].max - top);
                running[row] = {top, running[row].sum * factor};
                float* to = out + row * out_stride;
                for (int64_t i = 0; i < out_stride; i++) to[i] *= factor;
            }
            float sum = 0;
            int padded = int(s.padded);
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < padded; i++) {
                float share = exponential(score[i] - top);
                share = i < seen ? share : 0.0f;
                score[i] = share, sum += share;
            }
            running[row].sum += sum;
            if (form == Form::bf16) {
                auto to = reinterpret_cast<bf16*>(shares) + row * STRETCH;
                for (int i = 0; i < padded; i++) to[i] = to_bf16(score[i]);
            }
        }
        Rows p{form, shares, STRETCH, nullptr};
        for (int64_t block = 0; block < out_stride / BLOCK; block++)
            multiply(s.values, block, p, 0, count, [&](int64_t row, const float* c) {
                float* to = out + row * out_stride + block * BLOCK;
                for (int i = 0; i < BLOCK; i++) to[i] += c[i];
            });
    }

    // Attention over the latents as they lie, for all heads at once: W_UK goes into the queries, W_UV is applied to the result.
    void absorbed(const Pool& pool, int64_t at, const std::vector<const Span*>& chosen, const float* q, int64_t q_stride, float* out,
                  int64_t out_stride) {
        constexpr int64_t PAIRS = 64;
        const Layer& layer = layers[at];
        const Form form = attention_form(pool);
        const int64_t H = config.heads, N = config.nope, P = config.rope, V = config.value;
        const int64_t width = latent_width() + P, mixed_stride = round_up(config.latent, BLOCK), rows = int64_t(position.size());
        char* queries = queries_.at_least(rows * H * width * size_of(form));
        const int64_t heads_each = rows > 1 ? 1 : ceil_div(H, 4 * team.size());
        const int64_t by_heads = ceil_div(H, heads_each);
        team.run(int64_t(chosen.size()) * by_heads, [&](int64_t task, int) {
            const Span& span = *chosen[task / by_heads];
            auto put = [&](int64_t row, int64_t h, int64_t col, const float* from, int64_t count) {
                char* to = queries + ((row * H + h) * width + col) * size_of(form);
                if (form == Form::f32) std::memcpy(to, from, count * 4);
                else for (int64_t i = 0; i < count; i++) reinterpret_cast<bf16*>(to)[i] = to_bf16(from[i]);
            };
            for (int64_t h = task % by_heads * heads_each; h < std::min(H, (task % by_heads + 1) * heads_each); h++) {
                const float* nope = q + h * (N + P);
                Rows a{Form::f32, nope, size_t(q_stride), nullptr};
                for (int64_t block = 0; block < layer.key_absorb[h].blocks; block++)
                    multiply(layer.key_absorb[h], block, a, span.first, span.count, [&](int64_t row, const float* c) {
                        put(row, h, block * BLOCK, c, std::min<int64_t>(BLOCK, latent_width() - block * BLOCK));
                    });
                for (int64_t row = span.first; row < span.first + span.count; row++) put(row, h, latent_width(), nope + row * q_stride + N, P);
            }
        });

        works.clear();
        int64_t groups = 0;
        for (const Span* span : chosen) groups += ceil_div(span->count * H, PAIRS);
        for (const Span* span : chosen) {
            int64_t stretches = ceil_div(span->context, STRETCH);
            int64_t parts = std::clamp<int64_t>(ceil_div(4 * team.size(), groups), 1, stretches);  // as many for every group of a span
            for (int64_t pair = 0; pair < span->count * H; pair += PAIRS)
                for (int64_t part = 0; part < parts; part++)
                    works.push_back({span, pair, std::min(PAIRS, span->count * H - pair), stretches * part / parts, stretches * (part + 1) / parts});
        }
        float* partial = partial_.at_least(works.size() * PAIRS * mixed_stride);
        Running* running = running_.at_least(works.size() * PAIRS);
        Rows a{form, queries, size_t(width), nullptr};
        team.run(int64_t(works.size()), [&](int64_t task, int thread) {
            const Work& work = works[task];
            float* sums = partial + task * PAIRS * mixed_stride;
            std::memset(sums, 0, work.count * mixed_stride * sizeof(float));
            std::fill_n(running + task * PAIRS, work.count, Running{-INFINITY, 0});
            const int64_t first = work.span->first * H + work.first;
            const int64_t sees = position[(first + work.count - 1) / H] + 1;  // the last row sees the most
            for (int64_t s = work.begin; s < work.end && s * STRETCH < sees; s++) {
                Stretch stretch = latent_stretch(pool, at, *work.span, s, std::min(sees, work.span->context), form, workspaces[thread]);
                attend(a, first, work.count, stretch, [&](int64_t pair) { return position[pair / H] + 1; }, running + task * PAIRS, sums,
                       mixed_stride, workspaces[thread]);
            }
        });

        // The parts of each pair are brought together, then each head's W_UV.
        float* mixed = mixed_.at_least(rows * H * mixed_stride);
        std::vector<int64_t> first_work(chosen.size() + 1);
        for (size_t i = 0, w = 0; i < chosen.size(); i++, first_work[i] = int64_t(w))
            while (w < works.size() && works[w].span == chosen[i]) w++;
        team.run(int64_t(chosen.size()) * by_heads, [&](int64_t task, int) {
            const Span& span = *chosen[task / by_heads];
            const int64_t begin = first_work[task / by_heads];
            const int64_t parts = (first_work[task / by_heads + 1] - begin) / ceil_div(span.count * H, PAIRS);
            for (int64_t h = task % by_heads * heads_each; h < std::min(H, (task % by_heads + 1) * heads_each); h++) {
                for (int64_t t = 0; t < span.count; t++) {
                    int64_t pair = t * H + h, work = begin + pair / PAIRS * parts, in_work = pair % PAIRS;
                    float* to = mixed + (span.first * H + pair) * mixed_stride;
                    float top = -INFINITY, sum = 0;
                    for (int64_t p = 0; p < parts; p++) top = std::max(top, running[(work + p) * PAIRS + in_work].max);
                    std::memset(to, 0, mixed_stride * sizeof(float));
                    for (int64_t p = 0; p < parts; p++) {
                        const Running& one = running[(work + p) * PAIRS + in_work];
                        const float* from = partial + ((work + p) * PAIRS + in_work) * mixed_stride;
                        float factor = one.sum > 0 ? exponential(one.max - top) : 0;
                        sum += one.sum * factor;
                        for (int64_t i = 0; i < mixed_stride; i++) to[i] += from[i] * factor;
                    }
                    for (int64_t i = 0; i < mixed_stride; i++) to[i] /= sum;
                }
                Rows m{Form::f32, mixed + (span.first * H + h) * mixed_stride, size_t(H * mixed_stride), nullptr};
                for (int64_t block = 0; block < layer.value_up[h].blocks; block++)
                    multiply(layer.value_up[h], block, m, 0, span.count, [&](int64_t t, const float* c) {
                        std::memcpy(out + (span.first + t) * out_stride + h * V + block * BLOCK, c, std::min<int64_t>(BLOCK, V - block * BLOCK) * 4);
                    });
            }
        });
    }

    Stretch latent_stretch(const Pool& pool, int64_t layer, const Span& span, int64_t index, int64_t context, Form form, Workspace& own) const {
        const int64_t R = latent_width(), P = config.rope, key_words = words(form, R + P);
        Stretch s{{}, {}, index * STRETCH, std::min<int64_t>(STRETCH, context - index * STRETCH), 0};
        s.padded = round_up(s.tokens, PAGE);
        uint32_t* keys = own.keys.at_least(STRETCH * key_words);
        uint32_t* values = own.values.at_least(words(form, STRETCH * round_up(R, BLOCK)));
        for (int64_t t = 0; t < s.tokens; t += PAGE) {
            int32_t page = span.pages[(s.start + t) / PAGE];
            int64_t tokens = std::min<int64_t>(PAGE, s.tokens - t);
            WordRows c_kv = latents(pool, layer, page, tokens, form, own.staged_latent.at_least(PAGE * R));
            WordRows k_pe = rope_keys(pool, layer, page, tokens, form, own.staged_rope.at_least(PAGE * P));
            uint32_t* to = keys + t / BLOCK * BLOCK * key_words + t % BLOCK;
            pack_keys(c_kv, words(form, R), to);
            pack_keys(k_pe, words(form, P), to + words(form, R) * BLOCK);
            pack_values(c_kv, R, form, t, s.padded, values);
        }
        s.keys = {kind_of(form), int(key_words), keys, nullptr};
        s.values = {kind_of(form), int(words(form, s.padded)), values, nullptr};
        return s;
    }

    // Attention over keys and values written out for every head, a few heads at a time so that they fit a bounded buffer.
    void expanded(const Pool& pool, int64_t at, const Span& span, const float* q, int64_t q_stride, float* out, int64_t out_stride) {
        constexpr int64_t QUERIES = 8 * TILE_ROWS, BUDGET = int64_t(12) << 20;
        const Layer& layer = layers[at];
        const Form form = attention_form(pool);
        const int64_t H = config.heads, N = config.nope, P = config.rope, V = config.value;
        const int64_t width = nope_width() + P, key_words = words(form, width), value_stride = round_up(V, BLOCK);
        const int64_t keys_each = STRETCH * key_words, values_each = words(form, STRETCH * value_stride);  // words of a stretch and head
        const int64_t stretches = ceil_div(span.context, STRETCH);
        const int64_t group = std::clamp<int64_t>(BUDGET / (stretches * (keys_each + values_each) * 4), 1, H);
        auto keys = reinterpret_cast<uint32_t*>(keys_.at_least(group * stretches * keys_each * 4));
        auto values = reinterpret_cast<uint32_t*>(values_.at_least(group * stretches * values_each * 4));
        char* queries = queries_.at_least(span.count * H * width * size_of(form));
        team.run(ceil_div(span.count, 16), [&](int64_t task, int) {
            for (int64_t t = task * 16; t < std::min(span.count, (task + 1) * 16); t++)
                for (int64_t h = 0; h < H; h++) {
                    const float* from = q + (span.first + t) * q_stride + h * (N + P);
                    char* to = queries + (t * H + h) * width * size_of(form);
                    std::memset(to, 0, width * size_of(form));
                    for (int64_t i = 0; i < N + P; i++) {
                        int64_t col = i < N ? i : i - N + nope_width();
                        if (form == Form::bf16) reinterpret_cast<bf16*>(to)[col] = to_bf16(from[i]);
                        else reinterpret_cast<float*>(to)[col] = from[i];
                    }
                }
        });
        for (int64_t head = 0; head < H; head += group) {
            const int64_t heads = std::min(group, H - head);
            team.run(stretches, [&](int64_t s, int thread) {
                for (int64_t h = 0; h < heads; h++)
                    expand(pool, at, layer.key_up[head + h], layer.value_up[head + h], span, s, form, keys + (h * stretches + s) * keys_each,
                           values + (h * stretches + s) * values_each, h == 0, workspaces[thread]);
            });
            const int64_t tiles = ceil_div(span.count, QUERIES);
            team.run(heads * tiles, [&](int64_t task, int thread) {
                const int64_t h = task / tiles, first = (tiles - 1 - task % tiles) * QUERIES;  // the longest first
                const int64_t count = std::min(QUERIES, span.count - first);
                const int64_t sees = position[span.first + first + count - 1] + 1;
                Workspace& own = workspaces[thread];
                float* sums = own.expanded.at_least(std::max(QUERIES * value_stride, STRETCH * round_up(std::max(N, V), BLOCK)));
                std::memset(sums, 0, count * value_stride * sizeof(float));
                Running running[QUERIES];
                std::fill_n(running, count, Running{-INFINITY, 0});
                Rows a{form, queries + (head + h) * width * size_of(form), size_t(H * width), nullptr};
                for (int64_t s = 0; s * STRETCH < sees; s++) {
                    int64_t tokens = std::min<int64_t>(STRETCH, span.context - s * STRETCH), padded = round_up(tokens, PAGE);
                    Stretch stretch{{kind_of(form), int(key_words), keys + (h * stretches + s) * keys_each, nullptr},
                                    {kind_of(form), int(words(form, padded)), values + (h * stretches + s) * values_each, nullptr},
                                    s * STRETCH, tokens, padded};
                    attend(a, first, count, stretch, [&](int64_t t) { return position[span.first + t] + 1; }, running, sums, value_stride, own);
                }
                for (int64_t t = 0; t < count; t++) {
                    float* to = out + (span.first + first + t) * out_stride + (head + h) * V;
                    for (int64_t i = 0; i < V; i++) to[i] = sums[t * value_stride + i] / running[t].sum;
                }
            });
        }
    }

    // Writes out one head's keys and values of a stretch; its latents are gathered once for all heads (`gather`).
    void expand(const Pool& pool, int64_t layer, const Matrix& key_up, const Matrix& value_up, const Span& span, int64_t index, Form form,
                uint32_t* keys, uint32_t* values, bool gather, Workspace& own) const {
        const int64_t R = latent_width(), N = nope_width(), P = config.rope, V = config.value, key_words = words(form, N + P);
        const int64_t tokens = std::min<int64_t>(STRETCH, span.context - index * STRETCH), padded = round_up(tokens, PAGE);
        const Form latent_form = key_up.kind == Kind::bf16 ? form : Form::f32;
        const int64_t latent_words = words(latent_form, R), rope_words = words(form, P);
        uint32_t* c_kv = own.keys.at_least((STRETCH + PAGE) * (R + P));
        uint32_t *k_pe = c_kv + STRETCH * latent_words, *stage = k_pe + STRETCH * rope_words;
        if (gather)
            for (int64_t t = 0; t < padded; t += PAGE) {
                int32_t page = span.pages[(index * STRETCH + t) / PAGE];
                int64_t there = std::min<int64_t>(PAGE, tokens - t);
                WordRows c = latents(pool, layer, page, there, latent_form, stage);
                for (int i = 0; i < PAGE; i++) std::memcpy(c_kv + (t + i) * latent_words, c.at(i), latent_words * 4);
                WordRows k = rope_keys(pool, layer, page, there, form, stage);
                for (int i = 0; i < PAGE; i++) std::memcpy(k_pe + (t + i) * rope_words, k.at(i), rope_words * 4);
            }
        Rows a{latent_form, c_kv, size_t(R), nullptr};
        auto up = [&](const Matrix& w, int64_t cols) {  // [padded, cols] in `form`
            const int64_t stride = round_up(cols, BLOCK);
            char* to = reinterpret_cast<char*>(own.expanded.at_least(STRETCH * stride));
            for (int64_t block = 0; block < w.blocks; block++)
                multiply(w, block, a, 0, padded, [&](int64_t row, const float* c) {
                    char* here = to + (row * stride + block * BLOCK) * size_of(form);
                    if (form == Form::f32) std::memcpy(here, c, BLOCK * 4);
                    else for (int i = 0; i < BLOCK; i++) reinterpret_cast<bf16*>(here)[i] = to_bf16(c[i]);
                });
            return WordRows{reinterpret_cast<uint32_t*>(to), size_t(words(form, stride))};
        };
        WordRows k_nope = up(key_up, N);
        for (int64_t t = 0; t < padded; t += PAGE) {
            uint32_t* to = keys + t / BLOCK * BLOCK * key_words + t % BLOCK;
            pack_keys({k_nope.at(t), k_nope.stride}, words(form, N), to);
            pack_keys({k_pe + t * rope_words, size_t(rope_words)}, rope_words, to + words(form, N) * BLOCK);
        }
        WordRows v = up(value_up, V);
        for (int64_t t = 0; t < padded; t += PAGE) pack_values({v.at(t), v.stride}, V, form, t, padded, values);
    }

    // Expanding costs the whole context once, and then less for every row: multiplications of either form, per head and token of
    // context, with the absorbed ones weighted by how much longer they were measured to take.
    bool prefers_absorbed(const Span& span) const {
        if (attention_mode != Attention::by_cost) return attention_mode == Attention::absorbed;
        constexpr double ABSORBED_WEIGHT = 1.0;
        double R = config.latent, N = config.nope, P = config.rope, V = config.value, T = double(span.count);
        return ABSORBED_WEIGHT * T * (2 * R + P) < R * (N + V) + T * (N + P + V);
    }

    // Puts the latents and rotated keys of all rows into their slots.
    void write_latents(const Pool& pool, int64_t at, float* kv, int64_t stride) {
        const int64_t R = config.latent, P = config.rope;
        const int64_t rows = int64_t(position.size());
        team.run(ceil_div(rows, 16), [&](int64_t task, int) {
            auto after = [](int64_t row, const Span& span) { return row < span.first; };
            for (int64_t row = task * 16; row < std::min(rows, (task + 1) * 16); row++) {
                const Span& span = *(std::upper_bound(spans.begin(), spans.end(), row, after) - 1);
                float *latent = kv + row * stride, *key = latent + R;
                normalise(latent, layers[at].latent_norm, latent);
                rotate(key, row);
                int64_t slot = at * pool.slots + int64_t(span.pages[position[row] / PAGE]) * PAGE + position[row] % PAGE;
                if (pool.is_bf16) {
                    for (int64_t i = 0; i < R; i++) static_cast<bf16*>(pool.c_kv)[slot * R + i] = to_bf16(latent[i]);
                    for (int64_t i = 0; i < P; i++) static_cast<bf16*>(pool.k_pe)[slot * P + i] = to_bf16(key[i]);
                } else {
                    std::memcpy(static_cast<float*>(pool.c_kv) + slot * R, latent, R * 4);
                    std::memcpy(static_cast<float*>(pool.k_pe) + slot * P, key, P * 4);
                }
            }
        });
    }

    Rows normed_rows(const std::vector<float>& weight, int64_t rows) {
        const int64_t D = config.hidden, stride = round_up(D, BLOCK);
        float *x = x_.get(), *normed = normed_.at_least(rows * stride);
        team.run(ceil_div(rows, 16), [&](int64_t task, int) {
            for (int64_t row = task * 16; row < std::min(rows, (task + 1) * 16); row++) normalise(x + row * stride, weight, normed + row * stride);
        });
        return {Form::f32, normed, size_t(stride), nullptr};
    }

    // Keeps only the rows whose logits are wanted: behind the last layer's latents no other row is needed.
    void narrow() {
        const int64_t stride = round_up(config.hidden, BLOCK);
        std::vector<Span> kept;
        for (const Span& span : spans) {
            Span one{span.pages, 0, 0, 0};
            for (size_t i = 0; i < wanted.size(); i++)
                if (wanted[i] >= span.first && wanted[i] < span.first + span.count) {
                    if (!one.count) one.first = int64_t(i);
                    one.count++, one.context = position[wanted[i]] + 1;
                }
            if (one.count) kept.push_back(one);
        }
        for (size_t i = 0; i < wanted.size(); i++) {
            std::memmove(x_.get() + i * stride, x_.get() + wanted[i] * stride, config.hidden * sizeof(float));
            std::memmove(turns_.get() + i * config.rope, turns_.get() + wanted[i] * config.rope, config.rope * sizeof(float));
            position[i] = position[wanted[i]];
        }
        position.resize(wanted.size());
        spans = std::move(kept);
    }

    void attention(const Pool& pool, int64_t at) {
        const Layer& layer = layers[at];
        const int64_t D = config.hidden, H = config.heads, N = config.nope, P = config.rope, x_stride = round_up(D, BLOCK);
        const int64_t q_stride = round_up(H * (N + P), BLOCK), kv_stride = round_up(config.latent + P, BLOCK);
        const int64_t low_stride = round_up(config.q_rank, BLOCK), out_cols = H * config.value, out_stride = round_up(out_cols, BLOCK);
        int64_t rows = int64_t(position.size());
        const bool narrows = at + 1 == config.layers && wanted.size() < position.size();
        float* kv = kv_.at_least(rows * kv_stride);
        float* q_first = config.q_rank ? q_low_.at_least(rows * low_stride) : q_.at_least(rows * q_stride);
        const Target q_target{&layer.q, q_first, config.q_rank ? low_stride : q_stride};
        Rows a = normed_rows(layer.input_norm, rows);
        a = formed(a_, layer.q.kind, normed_.get(), rows, D, x_stride, rows);
        if (narrows) {
            project<1>(a, rows, {{{&layer.kv_a, kv, kv_stride}}});
            write_latents(pool, at, kv, kv_stride);
            narrow();
            rows = int64_t(position.size());
            if (!rows) return;
            normed_rows(layer.input_norm, rows);
            a = formed(a_, layer.q.kind, normed_.get(), rows, D, x_stride, rows);
            project<1>(a, rows, {{q_target}});
        } else {
            project<2>(a, rows, {{q_target, {&layer.kv_a, kv, kv_stride}}});
            write_latents(pool, at, kv, kv_stride);
        }
        float* q = q_.at_least(rows * q_stride);
        if (config.q_rank) {
            for (int64_t row = 0; row < rows; row++) normalise(q_first + row * low_stride, layer.q_norm, q_first + row * low_stride);
            a = formed(a_, layer.q_b.kind, q_first, rows, config.q_rank, low_stride, rows);
            project<1>(a, rows, {{{&layer.q_b, q, q_stride}}});
        }
        team.run(ceil_div(rows, 4), [&](int64_t task, int) {
            for (int64_t row = task * 4; row < std::min(rows, (task + 1) * 4); row++) {
                float* own = q + row * q_stride;
                for (int64_t h = 0; h < H; h++) rotate(own + h * (N + P) + N, row);
                for (int64_t i = 0; i < H * (N + P); i++) own[i] *= config.softmax_scale;
            }
        });
        float* out = heads_out_.at_least(rows * out_stride);
        std::vector<const Span*> short_spans;
        for (const Span& span : spans) {
            if (prefers_absorbed(span)) short_spans.push_back(&span);
            else expanded(pool, at, span, q, q_stride, out, out_stride);
        }
        if (!short_spans.empty()) absorbed(pool, at, short_spans, q, q_stride, out, out_stride);
        a = formed(a_, layer.o.kind, out, rows, out_cols, out_stride, rows);
        project_onto(layer.o, a, rows, x_.get(), x_stride);
    }

    // ---- experts (section 2.2); a dense layer is one "shared" expert and no routed ones

    // Writes silu(gate) * up * weight of a share of the blocks of `w` for rows [first, first + count).
    template <class Weight>
    static void gated(const Matrix& w, int64_t begin, int64_t end, const Rows& a, int64_t a_first, int64_t first, int64_t count, float* inner,
                      int64_t stride, Weight weight) {
        for (int64_t block = begin; block < std::min(w.blocks, end); block++)
            multiply(w, block, a, a_first, count, [&](int64_t row, const float* c) {
                int64_t to = row - a_first + first;
                float scale = weight(to), *out = inner + to * stride + block * (BLOCK / 2);
                for (int i = 0; i < BLOCK / 2; i++) out[i] = silu(c[i]) * c[i + BLOCK / 2] * scale;
            });
    }

    // Chooses K experts for a row by softmax affinity, within the best groups where the model has groups (2.2.2).
    void route(const float* logits, Choice* chosen) const {
        const int E = config.experts, per_group = E / config.groups;
        float score[512], best[512];
        float top = *std::max_element(logits, logits + E), sum = 0;
        for (int e = 0; e < E; e++) score[e] = std::exp(logits[e] - top), sum += score[e];
        if (config.groups > 1) {
            for (int g = 0; g < config.groups; g++) best[g] = *std::max_element(score + g * per_group, score + (g + 1) * per_group);
            for (int kept = 0; kept < config.top_groups; kept++) *std::max_element(best, best + config.groups) = -1;
            for (int g = 0; g < config.groups; g++)
                if (best[g] >= 0) std::fill_n(score + g * per_group, per_group, 0.0f);
        }
        for (int k = 0; k < config.top_k; k++) {
            int e = int(std::max_element(score, score + E) - score);
            chosen[k] = {e, score[e] / sum * config.routed_scale};
            score[e] = -1;
        }
    }

    void feed_forward(int64_t at) {
        const Layer& layer = layers[at];
        const int64_t rows = int64_t(position.size()), D = config.hidden, x_stride = round_up(D, BLOCK), K = config.top_k;
        const bool routed = !layer.experts.empty(), shared = layer.shared.down.rows > 0;
        const Kind kind = this->kind();
        Rows wide = normed_rows(layer.post_norm, rows);
        Rows a = formed(a_, kind, normed_.get(), rows, D, x_stride, rows);
        auto every = [](int64_t) { return 1.0f; };

        const int64_t shared_cols = layer.shared.gate_up.rows, shared_stride = round_up(shared_cols, BLOCK);
        float* shared_inner = shared_inner_.at_least(std::max<int64_t>(1, rows * shared_stride));
        const int64_t affinity_stride = round_up(config.experts, BLOCK);
        float* affinity = affinity_.at_least(std::max<int64_t>(1, rows * affinity_stride));
        Split by_gate = routed ? split(layer.gate, rows) : Split{1, 1, 0, 0};
        Split by_shared = shared ? split(layer.shared.gate_up, rows) : Split{1, 1, 0, 0};
        team.run(by_gate.tasks() + by_shared.tasks(), [&](int64_t task, int) {
            if (task < by_gate.tasks())
                return run_share(by_gate, task, layer.gate, wide, 0, rows, [&](int64_t row, int64_t block, const float* c) {
                    std::memcpy(affinity + row * affinity_stride + block * BLOCK, c, BLOCK * sizeof(float));
                });
            task -= by_gate.tasks();
            int64_t block = task % by_shared.by_blocks * by_shared.blocks_each, row = task / by_shared.by_blocks * by_shared.rows_each;
            gated(layer.shared.gate_up, block, block + by_shared.blocks_each, a, row, row, std::min(by_shared.rows_each, rows - row), shared_inner,
                  shared_stride, every);
        });

        Rows b, c;
        if (routed) {
            choose(affinity, affinity_stride, rows);
            c = inner_of_experts(layer, a, rows);
        }
        if (shared) b = formed(a_, kind, shared_inner, rows, shared_cols, shared_stride, rows);
        float* x = x_.get();
        auto onto = [&](int64_t row, int64_t block, const float* values) {
            float* to = x + row * x_stride + block * BLOCK;
            for (int i = 0; i < BLOCK; i++) to[i] += values[i];
        };
        // A task has some outputs of all experts, so that no two tasks add to the same numbers.
        const Split by_output = split(shared ? layer.shared.down : layer.experts[active[0]].down, 1);
        team.run(by_output.by_blocks, [&](int64_t task, int) {
            for (int64_t block = task * by_output.blocks_each; block < std::min(x_stride / BLOCK, (task + 1) * by_output.blocks_each); block++) {
                if (shared) multiply(layer.shared.down, block, b, 0, rows, [&](int64_t row, const float* values) { onto(row, block, values); });
                if (routed)
                    for (int32_t e : active)
                        multiply(layer.experts[e].down, block, c, start[e], start[e + 1] - start[e],
                                 [&](int64_t row, const float* values) { onto(sorted[row] / K, block, values); });
            }
        });
    }

    // What the active experts pass on to their last matrix, [choices, I], in the order of `sorted`.
    Rows inner_of_experts(const Layer& layer, const Rows& a, int64_t rows) {
        const int64_t inner_cols = config.expert_inner, inner_stride = round_up(inner_cols, BLOCK), count = start[config.experts];
        float* inner = inner_.at_least(count * inner_stride);
        Rows gathered = gather(a, rows, config.hidden);
        Split each = split(layer.experts[active[0]].gate_up, rows);
        team.run(int64_t(active.size()) * each.by_blocks, [&](int64_t task, int) {
            int32_t e = active[task / each.by_blocks];
            int64_t block = task % each.by_blocks * each.blocks_each;
            gated(layer.experts[e].gate_up, block, block + each.blocks_each, gathered, rows == 1 ? 0 : start[e], start[e], start[e + 1] - start[e],
                  inner, inner_stride, [&](int64_t row) { return choices[sorted[row]].weight; });
        });
        return formed(b_, kind(), inner, count, inner_cols, inner_stride, rows);
    }

    // The sum of a layer's experts for rows x [rows, D] that were routed elsewhere: out [rows, D]. A choice of -1 is somebody else's.
    void experts_of(int64_t at, const float* x, int64_t rows, const int32_t* ids, const float* weights, float* out) {
        const Layer& layer = layers[at];
        const int64_t D = config.hidden, stride = round_up(D, BLOCK), K = config.top_k;
        std::memset(out, 0, rows * D * sizeof(float));
        choices.resize(rows * K);
        for (int64_t i = 0; i < rows * K; i++) choices[i] = {ids[i], weights[i]};
        sort_choices(rows);
        if (active.empty()) return;
        float* own = normed_.at_least(rows * stride);
        for (int64_t row = 0; row < rows; row++) std::memcpy(own + row * stride, x + row * D, D * sizeof(float));
        Rows c = inner_of_experts(layer, formed(a_, kind(), own, rows, D, stride, rows), rows);
        const Split by_output = split(layer.experts[active[0]].down, 1);
        team.run(by_output.by_blocks, [&](int64_t task, int) {
            for (int64_t block = task * by_output.blocks_each; block < std::min(stride / BLOCK, (task + 1) * by_output.blocks_each); block++)
                for (int32_t e : active)
                    multiply(layer.experts[e].down, block, c, start[e], start[e + 1] - start[e], [&](int64_t row, const float* values) {
                        float* to = out + sorted[row] / K * D + block * BLOCK;
                        for (int64_t i = 0; i < std::min<int64_t>(BLOCK, D - block * BLOCK); i++) to[i] += values[i];
                    });
        });
    }

    // Routes all rows, then sorts the choices by expert.
    void choose(const float* affinity, int64_t stride, int64_t rows) {
        const int64_t K = config.top_k;
        choices.resize(rows * K);
        team.run(ceil_div(rows, 16), [&](int64_t task, int) {
            for (int64_t row = task * 16; row < std::min(rows, (task + 1) * 16); row++) route(affinity + row * stride, &choices[row * K]);
        });
        sort_choices(rows);
    }

    void sort_choices(int64_t rows) {
        const int64_t K = config.top_k;
        start.assign(config.experts + 1, 0);
        active.clear();
        for (const Choice& choice : choices)
            if (choice.expert >= 0) start[choice.expert + 1]++;
        for (int e = 0; e < config.experts; e++) {
            if (start[e + 1]) active.push_back(e);
            start[e + 1] += start[e];
        }
        std::vector<int32_t> next(start.begin(), start.end() - 1);
        sorted.resize(start[config.experts]);
        for (int64_t i = 0; i < rows * K; i++)
            if (choices[i].expert >= 0) sorted[next[choices[i].expert]++] = int32_t(i);
    }

    // The rows of `a` in the order of `sorted`; a single row is left where it is, all its experts read it there.
    Rows gather(const Rows& a, int64_t rows, int64_t cols) {
        if (rows == 1) return a;
        const int64_t K = config.top_k, bytes = round_up(cols, 2) * int64_t(size_of(a.form)), stride = int64_t(a.stride * size_of(a.form));
        const int64_t count = int64_t(sorted.size());
        char* to = sorted_.at_least(count * stride);
        float* scale = sorted_scale_.at_least(count);
        team.run(ceil_div(count, 64), [&](int64_t task, int) {
            for (int64_t i = task * 64; i < std::min(count, (task + 1) * 64); i++) {
                std::memcpy(to + i * stride, a.at(sorted[i] / K), bytes);
                if (a.scale) scale[i] = a.scale[sorted[i] / K];
            }
        });
        return {a.form, to, a.stride, a.scale ? scale : nullptr};
    }

    // ---- the whole

    // Rows that run together: the widest scratch, of the experts' inner values, stays within some megabytes.
    int64_t rows_together() const {
        int64_t widest = std::max<int64_t>(int64_t(config.top_k) * (config.expert_inner + config.hidden) * 6, int64_t(config.dense_inner) * 6);
        return std::clamp<int64_t>((int64_t(24) << 20) / widest / 16 * 16, 128, 1024);
    }

    void forward_rows(const Pool& pool, const int32_t* ids, const std::vector<int32_t>& rows_wanted, const std::vector<float*>& logits) {
        const int64_t D = config.hidden, stride = round_up(D, BLOCK), rows = int64_t(position.size());
        float* x = x_.at_least(rows * stride);
        team.run(ceil_div(rows, 16), [&](int64_t task, int) {
            for (int64_t row = task * 16; row < std::min(rows, (task + 1) * 16); row++) {
                std::memset(x + row * stride, 0, stride * sizeof(float));
                for (int64_t i = 0; i < D; i++) {
                    int64_t from = int64_t(ids[row]) * D + i;
                    x[row * stride + i] = wide_embedding() ? reinterpret_cast<const float*>(embedding.get())[from]
                                                           : to_float(reinterpret_cast<const bf16*>(embedding.get())[from]);
                }
            }
        });
        find_turns();
        wanted = rows_wanted;
        std::sort(wanted.begin(), wanted.end());
        wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
        for (int64_t at = 0; at < config.layers; at++) {
            attention(pool, at);
            if (!position.empty()) feed_forward(at);
        }
        if (wanted.empty()) return;
        const int64_t kept = int64_t(position.size());
        normed_rows(final_norm, kept);
        Rows a = formed(a_, head.kind, normed_.get(), kept, D, stride, kept);
        std::vector<std::vector<float*>> targets(kept);  // a row may be wanted twice
        for (size_t i = 0; i < rows_wanted.size(); i++)
            targets[std::lower_bound(wanted.begin(), wanted.end(), rows_wanted[i]) - wanted.begin()].push_back(logits[i]);
        Split s = split(head, kept);
        team.run(s.tasks(), [&](int64_t task, int) {
            run_share(s, task, head, a, 0, kept, [&](int64_t row, int64_t block, const float* c) {
                for (float* to : targets[row])
                    std::memcpy(to + block * BLOCK, c, std::min<int64_t>(BLOCK, config.vocab - block * BLOCK) * sizeof(float));
            });
        });
    }

    // A step of any size, cut into runs of rows that fit the scratch; a sequence's rows stay in order, so a later run finds the
    // latents of the earlier ones.
    void forward(const Pool& pool, const Sequence* sequences, int64_t count, const int32_t* ids, const int32_t* rows_wanted, int64_t n_wanted,
                 float* logits) {
        const int64_t together = rows_together();
        int64_t sequence = 0, taken = 0, start_row = 0;
        while (sequence < count) {
            spans.clear(), position.clear();
            while (sequence < count && int64_t(position.size()) < together) {
                const Sequence& s = sequences[sequence];
                int64_t rows = std::min<int64_t>(s.tokens - taken, together - int64_t(position.size())), first = s.context - s.tokens + taken;
                if (rows) spans.push_back({s.pages, int64_t(position.size()), rows, first + rows});
                for (int64_t i = 0; i < rows; i++) position.push_back(first + i);
                taken += rows;
                if (taken == s.tokens) sequence++, taken = 0;
            }
            const int64_t rows = int64_t(position.size());
            if (!rows) return;
            std::vector<int32_t> here;
            std::vector<float*> out;
            for (int64_t i = 0; i < n_wanted; i++)
                if (rows_wanted[i] >= start_row && rows_wanted[i] < start_row + rows) {
                    here.push_back(int32_t(rows_wanted[i] - start_row));
                    out.push_back(logits + i * config.vocab);
                }
            forward_rows(pool, ids + start_row, here, out);
            start_row += rows;
        }
    }

    // ---- loading

    enum Slot : int {  // mirrored by library.Slot
        EMBEDDING, HEAD, FINAL_NORM, INPUT_NORM, Q_NORM, LATENT_NORM, POST_NORM, Q, Q_B, KV_A, O, GATE,
        KEY_UP, KEY_ABSORB, VALUE_UP, EXPERT_GATE, EXPERT_UP, EXPERT_DOWN, SHARED_GATE, SHARED_UP, SHARED_DOWN,
    };

    template <class T>
    void put(int slot, int at, int index, const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
        Layer* layer = at >= 0 ? &layers[at] : nullptr;
        auto vector = [&](std::vector<float>& to) {
            to.resize(rows);
            for (int64_t i = 0; i < rows; i++) to[i] = to_float(data[i * row_stride]);
            weight_bytes += rows * 4;
        };
        auto matrix = [&](Matrix& to, Kind kind, int lanes = BLOCK, int first_lane = 0) {
            if (!to.rows) {
                to.shape(kind, rows, cols, lanes);
                weight_bytes += to.blocks * to.block_bytes() + (kind == Kind::i8 ? to.blocks * BLOCK * 4 : 0);
            }
            team.run(to.blocks, [&](int64_t block, int) {
                for (int64_t row = block * lanes; row < std::min(rows, (block + 1) * lanes); row++)
                    to.pack_row(data + row * row_stride, col_stride, block, first_lane + int(row - block * lanes));
            });
        };
        const Kind fine = kind() == Kind::f32 ? Kind::f32 : Kind::bf16;  // for the small matrices that int8 would cost most
        const Kind dear = kind() == Kind::i4 ? Kind::i8 : kind();              // for those that every token is multiplied with
        switch (slot) {
            case EMBEDDING: {
                int64_t size = wide_embedding() ? 4 : 2;
                char* to = embedding.at_least(rows * cols * size);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < cols; j++) {
                        float value = to_float(data[i * row_stride + j * col_stride]);
                        if (wide_embedding()) reinterpret_cast<float*>(to)[i * cols + j] = value;
                        else reinterpret_cast<bf16*>(to)[i * cols + j] = to_bf16(value);
                    }
                weight_bytes += rows * cols * size;
                return;
            }
            case HEAD: return matrix(head, dear);
            case FINAL_NORM: return vector(final_norm);
            case INPUT_NORM: return vector(layer->input_norm);
            case Q_NORM: return vector(layer->q_norm);
            case LATENT_NORM: return vector(layer->latent_norm);
            case POST_NORM: return vector(layer->post_norm);
            case Q: return matrix(layer->q, dear);
            case Q_B: return matrix(layer->q_b, dear);
            case KV_A: return matrix(layer->kv_a, dear);
            case O: return matrix(layer->o, dear);
            case GATE: return matrix(layer->gate, Kind::f32);
            case KEY_UP: return matrix(layer->key_up[index], fine);
            case KEY_ABSORB: return matrix(layer->key_absorb[index], fine);
            case VALUE_UP: return matrix(layer->value_up[index], fine);
            case EXPERT_GATE: return matrix(layer->experts[index].gate_up, kind(), BLOCK / 2, 0);
            case EXPERT_UP: return matrix(layer->experts[index].gate_up, kind(), BLOCK / 2, BLOCK / 2);
            case EXPERT_DOWN: return matrix(layer->experts[index].down, kind());
            case SHARED_GATE: return matrix(layer->shared.gate_up, kind(), BLOCK / 2, 0);
            case SHARED_UP: return matrix(layer->shared.gate_up, kind(), BLOCK / 2, BLOCK / 2);
            case SHARED_DOWN: return matrix(layer->shared.down, kind());
        }
    }
};

}  // namespace

// ------------------------------------------------------------------------------------------------------------------ C ABI

#pragma GCC visibility push(default)
extern "C" {

// The best of build.LEVELS that this processor runs, as its index.
int native_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return avx512 ? 2 : avx2 ? 1 : 0;
#else
    return 0;
#endif
}

// Null when there is no memory or no thread for it.
void* native_create(const Config* config, const float* frequencies, int threads) {
    try {
        return new Model(*config, frequencies, threads);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void native_destroy(void* model) { delete static_cast<Model*>(model); }

// Packs one tensor of the checkpoint [rows, cols]; returns 0, or 1 when there is no memory.
int native_put(void* model, int slot, int layer, int index, const void* data, int is_bf16, int64_t rows, int64_t cols, int64_t row_stride,
               int64_t col_stride) {
    auto& m = *static_cast<Model*>(model);
    try {
        m.team.begin();
        if (is_bf16) m.put(slot, layer, index, static_cast<const bf16*>(data), rows, cols, row_stride, col_stride);
        else m.put(slot, layer, index, static_cast<const float*>(data), rows, cols, row_stride, col_stride);
        m.team.end();
        return 0;
    } catch (const std::exception&) {
        m.team.end();
        return 1;
    }
}

int64_t native_weight_bytes(const void* model) { return static_cast<const Model*>(model)->weight_bytes; }

// How many threads take part, up to those it was created with.
void native_use_threads(void* model, int threads) { static_cast<Model*>(model)->team.resize(threads); }

void native_use_attention(void* model, int mode) { static_cast<Model*>(model)->attention_mode = Attention(mode); }

// Runs a step and fills logits [wanted, vocab]; returns 0, or 1 when there is no memory for its scratch.
int native_forward(void* model, const Pool* pool, const Sequence* sequences, int64_t count, const int32_t* ids, const int32_t* wanted,
                   int64_t n_wanted, float* logits) {
    auto& m = *static_cast<Model*>(model);
    try {
        m.team.begin();
        m.forward(*pool, sequences, count, ids, wanted, n_wanted, logits);
        m.team.end();
        return 0;
    } catch (const std::exception&) {
        m.team.end();
        return 1;
    }
}

// Sums the experts that are here over rows x [rows, D], choices ids and weights [rows, K] of `layer`, into out [rows, D]; returns 0, or 1
// when there is no memory for it. An id of -1 is left out.
int native_experts(void* model, int layer, const float* x, int64_t rows, const int32_t* ids, const float* weights, float* out) {
    auto& m = *static_cast<Model*>(model);
    try {
        m.team.begin();
        m.experts_of(layer, x, rows, ids, weights, out);
        m.team.end();
        return 0;
    } catch (const std::exception&) {
        m.team.end();
        return 1;
    }
}

}  // extern "C"
#pragma GCC visibility pop
