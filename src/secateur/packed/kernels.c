/* Products with packed matrices on x86-64, chosen at run time by what the CPU has.
 *
 * Layout (docs/format.md): a panel is 16 rows of the matrix. A block is a panel's 16 rows x 2 columns, with one bit for
 * each weight: bit 2 * row + column. The kept values of a panel follow each other, block by block, in the order of the
 * bits. So a block that is expanded under its mask is one 512-bit register: 16 lanes of two bfloat16, one lane a row.
 * That is what `vdpbf16ps` multiplies by a broadcast pair of inputs, and one row of the right-hand tile of AMX.
 *
 * Every function gets sizes that its caller has checked: `offsets` has one entry a panel and one more, and at least
 * VALUE_PADDING bytes follow the last value. No function keeps state, but for the tiles of AMX.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__x86_64__)
#error "these kernels are for x86-64; elsewhere packed matrices are unpacked"
#endif

#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define AVX2 __attribute__((target("avx2,fma,popcnt,bmi,bmi2")))
#define AVX512_FEATURES                                                                                                \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx512vnni,popcnt,bmi,bmi2,fma"
#define AVX512 __attribute__((target(AVX512_FEATURES)))
#define AMX __attribute__((target(AVX512_FEATURES ",amx-tile,amx-bf16")))

enum { LEVEL_NONE = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AMX = 3 };
enum { ROWS = 16, MASKS_AHEAD = 512, MAX_BATCH = 16 };

/* Bytes of values that are prefetched ahead. Measured: 2 KB on a Xeon (Granite Rapids), 8 KB on a Zen 5. */
static int64_t values_ahead = 2048;

typedef struct {
    const uint32_t *masks;  /* panels x blocks */
    const void *values;     /* uint16_t that hold bfloat16, or int8_t */
    const int64_t *offsets; /* of each panel's first value */
    const float *scales;    /* of each row, where values are int8_t */
    int64_t rows, columns;
} matrix_t;

INLINE const uint16_t *values_of(const matrix_t *w, int64_t panel) {
    return (const uint16_t *)w->values + w->offsets[panel];
}

INLINE const int8_t *bytes_of(const matrix_t *w, int64_t panel) {
    return (const int8_t *)w->values + w->offsets[panel];
}

INLINE int64_t blocks_of(const matrix_t *w) { return (w->columns + 1) / 2; }

INLINE int64_t rows_of_panel(const matrix_t *w, int64_t panel) {
    return w->rows - panel * ROWS < ROWS ? w->rows - panel * ROWS : ROWS;
}

/* ---------------------------------------------------------------------------------------------------------- threads */

/* Of the OpenMP runtime that torch has loaded, whatever its file is called; linking to another would start a second
 * team of threads. Without one, a single thread does all. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

typedef struct {
    void (*work)(const void *arguments, int64_t from, int64_t to);
    const void *arguments;
    int64_t count;
} job_t;

static void run_part(void *pointer) {
    const job_t *job = pointer;
    int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    int64_t from = job->count * part / parts, to = job->count * (part + 1) / parts;
    if (from < to) job->work(job->arguments, from, to);
}

/* Call `work` for parts of 0 to `count`, one a thread. */
static void in_parallel(void (*work)(const void *, int64_t, int64_t), const void *arguments, int64_t count,
                        int threads) {
    job_t job = {work, arguments, count};
    if (threads > count) threads = (int)count;
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
        GOMP_parallel(run_part, &job, (unsigned)threads, 0);
    else
        work(arguments, 0, count);
}

/* ------------------------------------------------------------------------------------------------ what the CPU has */

static int has_amx(void) {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

/* The fastest level that this CPU has. */
EXPORT int secateur_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return LEVEL_NONE;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("avx512bf16") ||
        !__builtin_cpu_supports("avx512vnni"))
        return LEVEL_AVX2;
    return has_amx() ? LEVEL_AMX : LEVEL_AVX512;
}

__attribute__((constructor)) static void set_prefetch_distance(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) values_ahead = 8192;
}

/* ------------------------------------------------------------------------------------------------ AVX-512, bfloat16 */

/* The block at `values`, expanded. In place, since vpexpandw waits for what its destination held before. */
AVX512 INLINE __m512i expand(const uint16_t *values, uint32_t mask) {
    __m512i block = _mm512_loadu_si512(values);
    __asm__("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(block) : "Yk"((__mmask32)mask));
    return block;
}

/* The same of int8 values, as 16-bit numbers. */
AVX512 INLINE __m512i expand_bytes(const int8_t *values, uint32_t mask) {
    __m256i block = _mm256_loadu_si256((const __m256i *)values);
    __asm__("vpexpandb %0, %0 %{%1%}%{z%}" : "+v"(block) : "Yk"((__mmask32)mask));
    return _mm512_cvtepi8_epi16(block);
}

/* 16-bit numbers, times the scales of their rows, as bfloat16. */
AVX512 INLINE __m512i scaled_to_bf16(__m512i block, __m512 scales) {
    __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(block, 16), 16));
    __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(block, 16));
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even, scales)));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd, scales)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* The next block of a panel, as bfloat16. */
AVX512 INLINE __m512i next_block(const void **values, uint32_t mask, int is_int8, __m512 scales) {
    if (is_int8) {
        const int8_t *bytes = *values;
        *values = bytes + _mm_popcnt_u32(mask);
        return scaled_to_bf16(expand_bytes(bytes, mask), scales);
    }
    const uint16_t *words = *values;
    *values = words + _mm_popcnt_u32(mask);
    return expand(words, mask);
}

INLINE const void *start_of(const matrix_t *w, int64_t panel) {
    return w->scales ? (const void *)bytes_of(w, panel) : (const void *)values_of(w, panel);
}

AVX512 INLINE __m512 dot(__m512 sum, __m512i block, __m512i pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)block, (__m512bh)pair);
}

AVX512 INLINE __m512 with_bias(__m512 sum, const uint16_t *bias, __mmask16 rows) {
    if (!bias) return sum;
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, bias));
    return _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}

AVX512 INLINE void store(uint16_t *y, __m512 sum, const uint16_t *bias, __mmask16 rows) {
    __m256bh rounded = _mm512_cvtneps_pbh(with_bias(sum, bias, rows));
    _mm256_mask_storeu_epi16(y, rows, (__m256i)rounded);
}

INLINE __mmask16 rows_in(const matrix_t *w, int64_t panel) {
    int64_t left = w->rows - panel * ROWS;
    return left >= ROWS ? 0xffff : (__mmask16)((1u << left) - 1);
}

/* One panel times `batch` inputs. Several sums of each input hide the latency of the product. */
AVX512 INLINE void panel_avx512(const matrix_t *w, int64_t panel, const uint32_t *x, int64_t x_stride, int batch,
                                int sums, const uint16_t *bias, uint16_t *y) {
    int64_t blocks = blocks_of(w), block = 0;
    const uint32_t *masks = w->masks + panel * blocks;
    const uint16_t *values = values_of(w, panel);
    __m512 sum[MAX_BATCH][4];
    for (int i = 0; i < batch; i++)
        for (int s = 0; s < sums; s++) sum[i][s] = _mm512_setzero_ps();
    for (; block + 4 <= blocks; block += 4) {
        _mm_prefetch((const char *)values + values_ahead, _MM_HINT_T0);
        _mm_prefetch((const char *)values + values_ahead + 64, _MM_HINT_T0);
        if (!(block & 15)) _mm_prefetch((const char *)(masks + block) + MASKS_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            uint32_t mask = masks[block + k];
            __m512i expanded = expand(values, mask);
            values += _mm_popcnt_u32(mask);
#pragma GCC unroll 16
            for (int i = 0; i < batch; i++)
                sum[i][k % sums] =
                    dot(sum[i][k % sums], expanded, _mm512_set1_epi32((int)x[i * x_stride + block + k]));
        }
    }
    for (; block < blocks; block++) {
        uint32_t mask = masks[block];
        __m512i expanded = expand(values, mask);
        values += _mm_popcnt_u32(mask);
        for (int i = 0; i < batch; i++)
            sum[i][0] = dot(sum[i][0], expanded, _mm512_set1_epi32((int)x[i * x_stride + block]));
    }
    __mmask16 rows = rows_in(w, panel);
#pragma GCC unroll 16
    for (int i = 0; i < batch; i++) {
        __m512 total = sum[i][0];
        for (int s = 1; s < sums; s++) total = _mm512_add_ps(total, sum[i][s]);
        store(y + i * w->rows + panel * ROWS, total, bias ? bias + panel * ROWS : NULL, rows);
    }
}

#define PANELS_AVX512(BATCH, SUMS)                                                                                     \
    AVX512 static void panels_avx512_##BATCH(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x,           \
                                             int64_t x_stride, const uint16_t *bias, uint16_t *y) {                    \
        for (int64_t panel = from; panel < to; panel++)                                                                \
            panel_avx512(w, panel, x, x_stride, BATCH, SUMS, bias, y);                                                 \
    }

PANELS_AVX512(1, 4)
PANELS_AVX512(2, 4)
PANELS_AVX512(3, 2)
PANELS_AVX512(4, 2)
PANELS_AVX512(6, 2)
PANELS_AVX512(8, 2)
PANELS_AVX512(16, 1)

AVX512 static void range_avx512(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x, int64_t x_stride,
                                int64_t batch, const uint16_t *bias, uint16_t *y) {
    while (batch > 0) {
        int64_t done;
#define TAKE(BATCH) (panels_avx512_##BATCH(w, from, to, x, x_stride, bias, y), (int64_t)BATCH)
        if (batch >= 16) done = TAKE(16);
        else if (batch >= 8) done = TAKE(8);
        else if (batch >= 6) done = TAKE(6);
        else if (batch >= 4) done = TAKE(4);
        else if (batch == 3) done = TAKE(3);
        else if (batch == 2) done = TAKE(2);
        else done = TAKE(1);
#undef TAKE
        x += done * x_stride, y += done * w->rows, batch -= done;
    }
}

/* ---------------------------------------------------------------------------------------------------- AMX, bfloat16 */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_in_row[16];
    uint8_t rows[16];
} __attribute__((packed)) tile_config_t;

/* Tiles 0 to 3 sum, 4 and 5 hold inputs, 6 weights. The last inputs, tile 5, may be fewer than 16. */
AMX static void configure_tiles(int tiles, int64_t last) {
    tile_config_t config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 7; tile++) config.bytes_in_row[tile] = 64, config.rows[tile] = 16;
    config.rows[tiles - 1] = config.rows[5] = (uint8_t)last;
    _tile_loadconfig(&config);
}

/* The 16 x 32 weights of up to 16 blocks, as AMX wants them; int8 values without their scales, so they are exact.
 * Returns the values that follow. */
AMX INLINE const void *fill_tile(uint32_t (*tile)[16], const uint32_t *masks, const void *values, int count,
                                 int is_int8) {
    __m512 ones = _mm512_set1_ps(1.0f);
    _mm_prefetch((const char *)masks + MASKS_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) {
        if (!(k & 1)) _mm_prefetch((const char *)values + values_ahead, _MM_HINT_T0);
        _mm512_store_si512(tile[k], next_block(&values, masks[k], is_int8, ones));
    }
    for (int k = count; k < 16; k++) _mm512_store_si512(tile[k], _mm512_setzero_si512());
    return values;
}

/* One panel times 16 * (tiles - 1) + `last` inputs, whose rows have zeros up to a multiple of 32 columns. */
AMX INLINE void panel_amx(const matrix_t *w, int64_t panel, const uint32_t *x, int64_t x_stride, int tiles,
                          int is_int8, int64_t last, const uint16_t *bias, uint16_t *y) {
    uint32_t weights[2][16][16] __attribute__((aligned(64)));
    float sums[16][16] __attribute__((aligned(64)));
    int64_t blocks = blocks_of(w);
    const uint32_t *masks = w->masks + panel * blocks;
    const void *values = start_of(w, panel);
    size_t stride = (size_t)x_stride * 4;
    _tile_zero(0);
    if (tiles > 1) _tile_zero(1);
    if (tiles > 2) _tile_zero(2);
    if (tiles > 3) _tile_zero(3);
#define ADD(TILE)                                                                                                      \
    if (tiles == TILE + 1) {                                                                                           \
        _tile_loadd(5, x + TILE * 16 * x_stride + block, stride);                                                      \
        _tile_dpbf16ps(TILE, 5, 6);                                                                                    \
    } else if (tiles > TILE + 1) {                                                                                     \
        _tile_loadd(4, x + TILE * 16 * x_stride + block, stride);                                                      \
        _tile_dpbf16ps(TILE, 4, 6);                                                                                    \
    }
    for (int64_t block = 0; block < blocks; block += 16) {
        uint32_t(*tile)[16] = weights[block >> 4 & 1];
        values = fill_tile(tile, masks + block, values, blocks - block < 16 ? (int)(blocks - block) : 16,
                           is_int8);
        _tile_loadd(6, tile, 64);
        ADD(0)
        ADD(1)
        ADD(2)
        ADD(3)
    }
#undef ADD
    __mmask16 mask = rows_in(w, panel);
    __m512 scales = is_int8 ? _mm512_maskz_loadu_ps(mask, w->scales + panel * ROWS) : _mm512_set1_ps(1.0f);
#define STORE(TILE)                                                                                                    \
    if (tiles > TILE) {                                                                                                \
        _tile_stored(TILE, sums, 64);                                                                                  \
        int64_t count = tiles == TILE + 1 ? last : 16;                                                                 \
        for (int64_t i = 0; i < count; i++)                                                                            \
            store(y + (TILE * 16 + i) * w->rows + panel * ROWS, _mm512_mul_ps(_mm512_load_ps(sums[i]), scales),        \
                  bias ? bias + panel * ROWS : NULL, mask);                                                            \
    }
    STORE(0)
    STORE(1)
    STORE(2)
    STORE(3)
#undef STORE
}

#define PANELS_AMX(TILES)                                                                                              \
    AMX static void panels_amx_##TILES(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x,                 \
                                       int64_t x_stride, int64_t last, const uint16_t *bias, uint16_t *y) {            \
        configure_tiles(TILES, last);                                                                                  \
        for (int64_t panel = from; panel < to; panel++) {                                                              \
            if (w->scales) panel_amx(w, panel, x, x_stride, TILES, 1, last, bias, y);                                  \
            else panel_amx(w, panel, x, x_stride, TILES, 0, last, bias, y);                                            \
        }                                                                                                              \
        _tile_release();                                                                                               \
    }

PANELS_AMX(1)
PANELS_AMX(2)
PANELS_AMX(3)
PANELS_AMX(4)

AMX static void range_amx(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x, int64_t x_stride,
                          int64_t batch, const uint16_t *bias, uint16_t *y) {
    for (int64_t left = batch; left > 0; left -= 64, x += 64 * x_stride, y += 64 * w->rows) {
        if (left > 48) panels_amx_4(w, from, to, x, x_stride, left < 64 ? left - 48 : 16, bias, y);
        else if (left > 32) panels_amx_3(w, from, to, x, x_stride, left - 32, bias, y);
        else if (left > 16) panels_amx_2(w, from, to, x, x_stride, left - 16, bias, y);
        else panels_amx_1(w, from, to, x, x_stride, left, bias, y);
    }
}

/* --------------------------------------------------------------------------------------------------- AVX2, bfloat16 */

/* For each byte of a mask, where each of 8 values goes: the control of a shuffle of bytes. 0x80 gives zero. */
static uint8_t shuffles[256][16] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_shuffles(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, from = 0; bit < 8; bit++) {
            int kept = mask >> bit & 1;
            shuffles[mask][2 * bit] = kept ? (uint8_t)(2 * from) : 0x80;
            shuffles[mask][2 * bit + 1] = kept ? (uint8_t)(2 * from + 1) : 0x80;
            from += kept;
        }
}

/* The four rows of a byte of a mask: four lanes of two bfloat16. */
AVX2 INLINE __m128i expand_byte(const uint16_t **values, uint32_t byte) {
    __m128i kept = _mm_loadu_si128((const __m128i *)*values);
    *values += _mm_popcnt_u32(byte);
    return _mm_shuffle_epi8(kept, _mm_load_si128((const __m128i *)shuffles[byte]));
}

AVX2 INLINE __m256 even_columns(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

AVX2 INLINE __m256 odd_columns(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}

INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40); /* not a number */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float widened(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

AVX2 INLINE void panel_avx2(const matrix_t *w, int64_t panel, const float *x, int64_t x_stride, int batch,
                            const uint16_t *bias, uint16_t *y) {
    int64_t blocks = blocks_of(w);
    const uint32_t *masks = w->masks + panel * blocks;
    const uint16_t *values = values_of(w, panel);
    __m256 sum[4][2];
    for (int i = 0; i < batch; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (int64_t block = 0; block < blocks; block++) {
        uint32_t mask = masks[block];
        if (!(block & 1)) _mm_prefetch((const char *)values + values_ahead, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++, mask >>= 16) {
            __m128i low = expand_byte(&values, mask & 0xff), high = expand_byte(&values, mask >> 8 & 0xff);
            __m256i pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            __m256 even = even_columns(pairs), odd = odd_columns(pairs);
#pragma GCC unroll 4
            for (int i = 0; i < batch; i++) {
                const float *pair = x + i * x_stride + 2 * block;
                sum[i][half] = _mm256_fmadd_ps(even, _mm256_broadcast_ss(pair), sum[i][half]);
                sum[i][half] = _mm256_fmadd_ps(odd, _mm256_broadcast_ss(pair + 1), sum[i][half]);
            }
        }
    }
    int64_t count = rows_of_panel(w, panel);
    for (int i = 0; i < batch; i++) {
        float total[ROWS];
        _mm256_storeu_ps(total, sum[i][0]);
        _mm256_storeu_ps(total + 8, sum[i][1]);
        for (int64_t row = 0; row < count; row++) {
            float plus = bias ? widened(bias[panel * ROWS + row]) : 0.0f;
            y[i * w->rows + panel * ROWS + row] = rounded(total[row] + plus);
        }
    }
}

AVX2 static void range_avx2(const matrix_t *w, int64_t from, int64_t to, const float *x, int64_t x_stride,
                            int64_t batch, const uint16_t *bias, uint16_t *y) {
    for (; batch >= 4; batch -= 4, x += 4 * x_stride, y += 4 * w->rows)
        for (int64_t panel = from; panel < to; panel++) panel_avx2(w, panel, x, x_stride, 4, bias, y);
    for (; batch >= 2; batch -= 2, x += 2 * x_stride, y += 2 * w->rows)
        for (int64_t panel = from; panel < to; panel++) panel_avx2(w, panel, x, x_stride, 2, bias, y);
    for (; batch >= 1; batch -= 1, x += x_stride, y += w->rows)
        for (int64_t panel = from; panel < to; panel++) panel_avx2(w, panel, x, x_stride, 1, bias, y);
}

/* ------------------------------------------------------------------------------------- int8 values, int16 activations */

/* x is rounded to 16 bits with a scale for each vector. A sum of 32 bits takes FLUSH products of pairs, and two more at
 * the end of a row, without overflow, 2 * 127 * 32767 * (FLUSH + 2) < 2^31, and goes to float then. */
enum { FLUSH = 256 };

AVX512 INLINE void panel_int8_avx512(const matrix_t *w, int64_t panel, const uint32_t *x, int64_t x_stride,
                                     const float *x_scales, int batch, int sums, float *y) {
    int64_t blocks = blocks_of(w);
    const uint32_t *masks = w->masks + panel * blocks;
    const int8_t *values = bytes_of(w, panel);
    __m512 total[8];
    for (int i = 0; i < batch; i++) total[i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < blocks; start += FLUSH * sums) {
        int64_t block = start, end = blocks - start < FLUSH * sums ? blocks : start + FLUSH * sums;
        __m512i sum[8][4];
        for (int i = 0; i < batch; i++)
            for (int s = 0; s < sums; s++) sum[i][s] = _mm512_setzero_si512();
        for (; block + 4 <= end; block += 4) {
            _mm_prefetch((const char *)values + values_ahead, _MM_HINT_T0);
            if (!(block & 15)) _mm_prefetch((const char *)(masks + block) + MASKS_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                uint32_t mask = masks[block + k];
                __m512i expanded = expand_bytes(values, mask);
                values += _mm_popcnt_u32(mask);
#pragma GCC unroll 8
                for (int i = 0; i < batch; i++)
                    sum[i][k % sums] = _mm512_dpwssd_epi32(sum[i][k % sums], expanded,
                                                           _mm512_set1_epi32((int)x[i * x_stride + block + k]));
            }
        }
        for (; block < end; block++) {
            __m512i expanded = expand_bytes(values, masks[block]);
            values += _mm_popcnt_u32(masks[block]);
            for (int i = 0; i < batch; i++)
                sum[i][0] =
                    _mm512_dpwssd_epi32(sum[i][0], expanded, _mm512_set1_epi32((int)x[i * x_stride + block]));
        }
        for (int i = 0; i < batch; i++)
            for (int s = 0; s < sums; s++) total[i] = _mm512_add_ps(total[i], _mm512_cvtepi32_ps(sum[i][s]));
    }
    __mmask16 rows = rows_in(w, panel);
    __m512 scales = _mm512_maskz_loadu_ps(rows, w->scales + panel * ROWS);
#pragma GCC unroll 8
    for (int i = 0; i < batch; i++) {
        __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(total[i], scales), _mm512_set1_ps(x_scales[i]));
        _mm512_mask_storeu_ps(y + i * w->rows + panel * ROWS, rows, scaled);
    }
}

#define PANELS_INT8(BATCH, SUMS)                                                                                       \
    AVX512 static void panels_int8_##BATCH(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x,             \
                                           int64_t x_stride, const float *x_scales, float *y) {                        \
        for (int64_t panel = from; panel < to; panel++)                                                                \
            panel_int8_avx512(w, panel, x, x_stride, x_scales, BATCH, SUMS, y);                                        \
    }

PANELS_INT8(1, 4)
PANELS_INT8(2, 4)
PANELS_INT8(4, 2)
PANELS_INT8(8, 2)

AVX512 static void range_int8_avx512(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x, int64_t x_stride,
                                     const float *x_scales, int64_t batch, float *y) {
    while (batch > 0) {
        int64_t done;
#define TAKE(BATCH) (panels_int8_##BATCH(w, from, to, x, x_stride, x_scales, y), (int64_t)BATCH)
        if (batch >= 8) done = TAKE(8);
        else if (batch >= 4) done = TAKE(4);
        else if (batch >= 2) done = TAKE(2);
        else done = TAKE(1);
#undef TAKE
        x += done * x_stride, x_scales += done, y += done * w->rows, batch -= done;
    }
}

/* For each byte of a mask, where each of 8 bytes goes. */
static uint8_t byte_shuffles[256][8] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_byte_shuffles(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, from = 0; bit < 8; bit++) {
            int kept = mask >> bit & 1;
            byte_shuffles[mask][bit] = kept ? (uint8_t)from : 0x80;
            from += kept;
        }
}

/* Eight rows of a block, of 16 bits of a mask: 16 numbers of 16 bits. */
AVX2 INLINE __m256i expand_bytes_avx2(const int8_t **values, uint32_t mask) {
    __m128i part[2];
    for (int half = 0; half < 2; half++, mask >>= 8) {
        __m128i kept = _mm_loadl_epi64((const __m128i *)*values);
        part[half] = _mm_shuffle_epi8(kept, _mm_loadl_epi64((const __m128i *)byte_shuffles[mask & 0xff]));
        *values += _mm_popcnt_u32(mask & 0xff);
    }
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(part[0], part[1]));
}

AVX2 INLINE void panel_int8_avx2(const matrix_t *w, int64_t panel, const uint32_t *x, int64_t x_stride,
                                 const float *x_scales, int batch, float *y) {
    int64_t blocks = blocks_of(w);
    const uint32_t *masks = w->masks + panel * blocks;
    const int8_t *values = bytes_of(w, panel);
    __m256 total[4][2];
    for (int i = 0; i < batch; i++) total[i][0] = total[i][1] = _mm256_setzero_ps();
    for (int64_t start = 0; start < blocks; start += FLUSH) {
        int64_t end = blocks - start < FLUSH ? blocks : start + FLUSH;
        __m256i sum[4][2];
        for (int i = 0; i < batch; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int64_t block = start; block < end; block++) {
            uint32_t mask = masks[block];
            if (!(block & 3)) _mm_prefetch((const char *)values + values_ahead, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++, mask >>= 16) {
                __m256i expanded = expand_bytes_avx2(&values, mask);
#pragma GCC unroll 4
                for (int i = 0; i < batch; i++) {
                    __m256i pair = _mm256_set1_epi32((int)x[i * x_stride + block]);
                    sum[i][half] = _mm256_add_epi32(sum[i][half], _mm256_madd_epi16(expanded, pair));
                }
            }
        }
        for (int i = 0; i < batch; i++)
            for (int half = 0; half < 2; half++)
                total[i][half] = _mm256_add_ps(total[i][half], _mm256_cvtepi32_ps(sum[i][half]));
    }
    int64_t count = rows_of_panel(w, panel);
    for (int i = 0; i < batch; i++) {
        float sums[ROWS];
        _mm256_storeu_ps(sums, total[i][0]);
        _mm256_storeu_ps(sums + 8, total[i][1]);
        for (int64_t row = 0; row < count; row++)
            y[i * w->rows + panel * ROWS + row] = sums[row] * w->scales[panel * ROWS + row] * x_scales[i];
    }
}

AVX2 static void range_int8_avx2(const matrix_t *w, int64_t from, int64_t to, const uint32_t *x, int64_t x_stride,
                                 const float *x_scales, int64_t batch, float *y) {
    for (; batch >= 4; batch -= 4, x += 4 * x_stride, x_scales += 4, y += 4 * w->rows)
        for (int64_t panel = from; panel < to; panel++)
            panel_int8_avx2(w, panel, x, x_stride, x_scales, 4, y);
    for (; batch >= 1; batch -= 1, x += x_stride, x_scales += 1, y += w->rows)
        for (int64_t panel = from; panel < to; panel++)
            panel_int8_avx2(w, panel, x, x_stride, x_scales, 1, y);
}

/* -------------------------------------------------------------------------------------------------------- unpacking */

/* Blocks from `block` on, one weight after the other: the end of a panel. */
INLINE void unpack_end(const matrix_t *w, int64_t panel, int64_t block, const void *values, uint16_t *out) {
    int64_t blocks = blocks_of(w), rows = rows_of_panel(w, panel);
    for (; block < blocks; block++)
        for (int bit = 0; bit < 32; bit++) {
            int64_t row = bit / 2, column = 2 * block + bit % 2;
            uint32_t kept = w->masks[panel * blocks + block] >> bit & 1;
            if (row < rows && column < w->columns) {
                uint16_t value = 0;
                if (kept && w->scales) value = rounded((float)*(const int8_t *)values * w->scales[panel * ROWS + row]);
                else if (kept) value = *(const uint16_t *)values;
                out[row * w->columns + column] = value;
            }
            values = (const char *)values + kept * (w->scales ? 1 : 2);
        }
}

/* The four rows of a byte of a mask, of int8 values, as four lanes of two bfloat16. */
AVX2 INLINE __m128i expand_byte_int8(const int8_t **values, uint32_t byte, __m128 scales) {
    __m128i kept = _mm_loadl_epi64((const __m128i *)*values);
    __m128i wide = _mm_cvtepi8_epi16(_mm_shuffle_epi8(kept, _mm_loadl_epi64((const __m128i *)byte_shuffles[byte])));
    *values += _mm_popcnt_u32(byte);
    __m128 even = _mm_mul_ps(_mm_cvtepi32_ps(_mm_srai_epi32(_mm_slli_epi32(wide, 16), 16)), scales);
    __m128 odd = _mm_mul_ps(_mm_cvtepi32_ps(_mm_srai_epi32(wide, 16)), scales);
    __m128i half = _mm_set1_epi32(0x7fff), one = _mm_set1_epi32(1);
    __m128i low = _mm_castps_si128(even), high = _mm_castps_si128(odd);
    low = _mm_add_epi32(low, _mm_add_epi32(half, _mm_and_si128(_mm_srli_epi32(low, 16), one)));
    high = _mm_add_epi32(high, _mm_add_epi32(half, _mm_and_si128(_mm_srli_epi32(high, 16), one)));
    return _mm_or_si128(_mm_srli_epi32(low, 16), _mm_and_si128(high, _mm_set1_epi32((int)0xffff0000u)));
}

/* Four blocks at a time: for each byte of their masks, 4 rows x 8 columns. */
AVX2 static void unpack_panel_avx2(const matrix_t *w, int64_t panel, uint16_t *out) {
    int64_t blocks = blocks_of(w), rows = rows_of_panel(w, panel), block = 0;
    const uint32_t *masks = w->masks + panel * blocks;
    const void *values = start_of(w, panel);
    for (; rows == ROWS && 2 * block + 8 <= w->columns; block += 4) {
        __m128i part[4][4];
        for (int k = 0; k < 4; k++)
            for (int byte = 0; byte < 4; byte++) {
                uint32_t mask = masks[block + k] >> 8 * byte & 0xff;
                if (w->scales)
                    part[byte][k] = expand_byte_int8((const int8_t **)&values, mask,
                                                     _mm_loadu_ps(w->scales + panel * ROWS + 4 * byte));
                else part[byte][k] = expand_byte((const uint16_t **)&values, mask);
            }
        for (int byte = 0; byte < 4; byte++) {
            __m128i a = _mm_unpacklo_epi32(part[byte][0], part[byte][1]);
            __m128i b = _mm_unpacklo_epi32(part[byte][2], part[byte][3]);
            __m128i c = _mm_unpackhi_epi32(part[byte][0], part[byte][1]);
            __m128i d = _mm_unpackhi_epi32(part[byte][2], part[byte][3]);
            uint16_t *target = out + 4 * byte * w->columns + 2 * block;
            _mm_storeu_si128((__m128i *)target, _mm_unpacklo_epi64(a, b));
            _mm_storeu_si128((__m128i *)(target + w->columns), _mm_unpackhi_epi64(a, b));
            _mm_storeu_si128((__m128i *)(target + 2 * w->columns), _mm_unpacklo_epi64(c, d));
            _mm_storeu_si128((__m128i *)(target + 3 * w->columns), _mm_unpackhi_epi64(c, d));
        }
    }
    unpack_end(w, panel, block, values, out);
}

/* 16 blocks at a time: 16 rows x 32 columns, by a transposition of 16 x 16 pairs. */
AVX512 INLINE void unpack_panel_avx512(const matrix_t *w, int64_t panel, int is_int8, uint16_t *out) {
    int64_t blocks = blocks_of(w), block = 0;
    const uint32_t *masks = w->masks + panel * blocks;
    const void *values = start_of(w, panel);
    __mmask16 rows = rows_in(w, panel);
    __m512 scales = is_int8 ? _mm512_maskz_loadu_ps(rows, w->scales + panel * ROWS) : _mm512_setzero_ps();
    for (; rows == 0xffff && 2 * block + 32 <= w->columns; block += 16) {
        __m512i a[16], b[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) a[k] = next_block(&values, masks[block + k], is_int8, scales);
#pragma GCC unroll 8
        for (int k = 0; k < 16; k += 2) {
            b[k] = _mm512_unpacklo_epi32(a[k], a[k + 1]);
            b[k + 1] = _mm512_unpackhi_epi32(a[k], a[k + 1]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 16; k += 4) {
            a[k] = _mm512_unpacklo_epi64(b[k], b[k + 2]);
            a[k + 1] = _mm512_unpackhi_epi64(b[k], b[k + 2]);
            a[k + 2] = _mm512_unpacklo_epi64(b[k + 1], b[k + 3]);
            a[k + 3] = _mm512_unpackhi_epi64(b[k + 1], b[k + 3]);
        }
        /* Lane l of a[4 q + j] holds row 4 l + j of blocks 4 q to 4 q + 3. */
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
            __m512i high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
            __m512i low2 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
            __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
            uint16_t *target = out + j * w->columns + 2 * block;
            _mm512_storeu_si512(target, _mm512_shuffle_i32x4(low, high, 0x88));
            _mm512_storeu_si512(target + 8 * w->columns, _mm512_shuffle_i32x4(low, high, 0xdd));
            _mm512_storeu_si512(target + 4 * w->columns, _mm512_shuffle_i32x4(low2, high2, 0x88));
            _mm512_storeu_si512(target + 12 * w->columns, _mm512_shuffle_i32x4(low2, high2, 0xdd));
        }
    }
    unpack_end(w, panel, block, values, out);
}

AVX512 static void unpack_range_avx512(const matrix_t *w, int64_t panel, uint16_t *out) {
    if (w->scales) unpack_panel_avx512(w, panel, 1, out);
    else unpack_panel_avx512(w, panel, 0, out);
}

/* ---------------------------------------------------------------------------------------------------------- exports */

typedef struct {
    const matrix_t *w;
    int level;
    const void *x; /* float for AVX2, else bfloat16 */
    int64_t x_stride, batch;
    const uint16_t *bias;
    uint16_t *y;
} product_t;

static void multiply_panels(const void *pointer, int64_t from, int64_t to) {
    const product_t *p = pointer;
    if (p->level == LEVEL_AVX2) range_avx2(p->w, from, to, p->x, p->x_stride, p->batch, p->bias, p->y);
    else if (p->level == LEVEL_AMX) range_amx(p->w, from, to, p->x, p->x_stride / 2, p->batch, p->bias, p->y);
    else range_avx512(p->w, from, to, p->x, p->x_stride / 2, p->batch, p->bias, p->y);
}

typedef struct {
    const matrix_t *w;
    int level;
    int64_t first_row;
    uint16_t *out;
} unpacking_t;

static void unpack_panels(const void *pointer, int64_t from, int64_t to) {
    const unpacking_t *u = pointer;
    for (int64_t i = from; i < to; i++) {
        int64_t panel = u->first_row / ROWS + i;
        uint16_t *out = u->out + i * ROWS * u->w->columns;
        if (u->level >= LEVEL_AVX512) unpack_range_avx512(u->w, panel, out);
        else unpack_panel_avx2(u->w, panel, out);
    }
}

typedef struct {
    const matrix_t *w;
    int level;
    const uint32_t *x; /* vectors of 16-bit numbers: one for each input, and one more for an input with outliers */
    int64_t x_stride;
    const float *x_scales;
    int64_t batch;
    const int64_t *first; /* of each input's vectors, and their number */
    float *sums;          /* vectors x rows */
    const uint16_t *bias;
    uint16_t *y;
} int8_product_t;

/* Sums of a vector, with those of its outliers and the bias where there are any, as bfloat16. */
AVX2 static void round_sums(const float *sums, const float *others, const uint16_t *bias, int64_t rows, uint16_t *y) {
    for (int64_t row = 0; row < rows; row++) {
        float total = others ? sums[row] + others[row] : sums[row];
        y[row] = rounded(bias ? total + widened(bias[row]) : total);
    }
}

static void multiply_int8_panels(const void *pointer, int64_t from, int64_t to) {
    const int8_product_t *p = pointer;
    int64_t rows = p->w->rows, vectors = p->first[p->batch];
    if (p->level >= LEVEL_AVX512)
        range_int8_avx512(p->w, from, to, p->x, p->x_stride, p->x_scales, vectors, p->sums);
    else
        range_int8_avx2(p->w, from, to, p->x, p->x_stride, p->x_scales, vectors, p->sums);
    int64_t end = to * ROWS < rows ? to * ROWS : rows;
    for (int64_t i = 0; i < p->batch; i++) {
        const float *sums = p->sums + p->first[i] * rows;
        int is_split = p->first[i + 1] - p->first[i] == 2;
        round_sums(sums + from * ROWS, is_split ? sums + rows + from * ROWS : NULL,
                   p->bias ? p->bias + from * ROWS : NULL, end - from * ROWS, p->y + i * rows + from * ROWS);
    }
}

/* What is this many times the mean size of a vector is an outlier, and gets a vector with a scale of its own: with one
 * scale, the other entries would be rounded coarsely. Rounding to 128 / 2^15 of their mean is as fine as bfloat16. */
enum { OUTLIER = 128 };

/* The mean size of a vector's entries, and in `most` the largest. A sum that is not finite makes both so. */
AVX2 static float mean_size(const uint16_t *x, int64_t columns, float *most) {
    enum { LANES = 32 }; /* several sums, so that the compiler can take several entries at once */
    float largest[LANES] = {0}, sums[LANES] = {0};
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES)
        for (int k = 0; k < LANES; k++) {
            float size = fabsf(widened(x[c + k]));
            largest[k] = size > largest[k] ? size : largest[k];
            sums[k] += size;
        }
    for (int k = 0; c < columns; c++, k++) {
        float size = fabsf(widened(x[c]));
        largest[k] = size > largest[k] ? size : largest[k];
        sums[k] += size;
    }
    for (int k = 1; k < LANES; k++) {
        largest[0] = largest[k] > largest[0] ? largest[k] : largest[0];
        sums[0] += sums[k];
    }
    *most = largest[0] + sums[0] * 0.0f; /* 0, or not a number */
    return sums[0] / (float)columns;
}

/* The mean size of the entries up to `to` in size. */
static float mean_below(const uint16_t *x, int64_t columns, float to) {
    float sum = 0.0f, count = 0.0f;
    for (int64_t c = 0; c < columns; c++) {
        float size = fabsf(widened(x[c]));
        if (size <= to) sum += size, count += 1.0f;
    }
    return count > 0.0f ? sum / count : 0.0f;
}

/* Round the entries of a vector above `from` and up to `to` in size to 16 bits; the others are 0. Returns the scale. */
AVX2 static float quantised(const uint16_t *x, int64_t columns, float from, float to, int16_t *out) {
    float inverse = to > 0 ? 32767.0f / to : 0.0f;
    for (int64_t c = 0; c < columns; c++) {
        float value = widened(x[c]), size = fabsf(value);
        float kept = (size > from) & (size <= to) ? value * inverse : 0.0f;
        out[c] = (int16_t)(int32_t)(kept + copysignf(0.5f, kept));
    }
    return to / 32767.0f;
}

/* A vector as 16-bit numbers, and its scale; an outlier goes to a second vector. Returns how many there are. */
static int64_t split(const uint16_t *x, int64_t columns, int64_t stride, int16_t *out, float *scales) {
    float most, bound = OUTLIER * mean_size(x, columns, &most);
    if (!(most > bound)) {
        scales[0] = quantised(x, columns, 0.0f, most, out);
        return 1;
    }
    bound = OUTLIER * mean_below(x, columns, bound); /* without the outliers, which raised the mean */
    scales[0] = quantised(x, columns, 0.0f, bound, out);
    scales[1] = quantised(x, columns, bound, most, out + 2 * stride);
    return 2;
}

/* bfloat16 values: y = x W^T + bias. */
static int multiply_bf16(int level, const matrix_t *w, const uint16_t *x, int64_t batch, const uint16_t *bias,
                         uint16_t *y, int threads) {
    int64_t columns = w->columns, padded = (columns + 31) / 32 * 32;
    const void *inputs = x;
    void *copy = NULL;
    if (level == LEVEL_AVX2) {
        float *wide = copy = calloc((size_t)(batch * padded), sizeof(float));
        if (!copy) return 1;
        for (int64_t i = 0; i < batch; i++)
            for (int64_t c = 0; c < columns; c++) wide[i * padded + c] = widened(x[i * columns + c]);
    } else if (columns % (level == LEVEL_AMX ? 32 : 2)) {
        uint16_t *wide = copy = calloc((size_t)(batch * padded), sizeof(uint16_t));
        if (!copy) return 1;
        for (int64_t i = 0; i < batch; i++) memcpy(wide + i * padded, x + i * columns, (size_t)columns * 2);
    } else {
        padded = columns;
    }
    if (copy) inputs = copy;
    product_t product = {w, level, inputs, padded, batch, bias, y};
    in_parallel(multiply_panels, &product, (w->rows + ROWS - 1) / ROWS, threads);
    free(copy);
    return 0;
}

/* int8 values: x is rounded to 16 bits, and y = scales * (x W^T) + bias. */
static int multiply_int8(int level, const matrix_t *w, const uint16_t *x, int64_t batch, const uint16_t *bias,
                         uint16_t *y, int threads) {
    int64_t stride = (w->columns + 1) / 2;
    int16_t *inputs = calloc((size_t)(2 * batch * stride), sizeof(uint32_t));
    float *x_scales = malloc((size_t)(2 * batch) * sizeof(float));
    int64_t *first = malloc((size_t)(batch + 1) * sizeof(int64_t));
    float *sums = NULL;
    int failed = !inputs || !x_scales || !first;
    if (!failed) {
        first[0] = 0;
        for (int64_t i = 0; i < batch; i++)
            first[i + 1] = first[i] + split(x + i * w->columns, w->columns, stride, inputs + 2 * first[i] * stride,
                                            x_scales + first[i]);
        sums = malloc((size_t)(first[batch] * w->rows) * sizeof(float));
        failed = !sums;
    }
    if (!failed) {
        int8_product_t product = {w,    level, (const uint32_t *)inputs, stride, x_scales, batch, first,
                                  sums, bias,  y};
        in_parallel(multiply_int8_panels, &product, (w->rows + ROWS - 1) / ROWS, threads);
    }
    free(inputs);
    free(x_scales);
    free(first);
    free(sums);
    return failed;
}

/* y = x W^T + bias, for `batch` inputs x of `columns` bfloat16, with sums in float32.
 *
 * `scales` is NULL for bfloat16 values, and the scale of each row for int8 values. Returns 0, or 1 where memory for a
 * copy of x is missing. Cost: one read of W for each 64 inputs with AMX, 16 with AVX-512 (8 of int8), 4 with AVX2.
 */
EXPORT int secateur_multiply(int level, const uint32_t *masks, const void *values, const int64_t *offsets,
                             const float *scales, int64_t rows, int64_t columns, const uint16_t *x, int64_t batch,
                             const uint16_t *bias, uint16_t *y, int threads) {
    matrix_t w = {masks, values, offsets, scales, rows, columns};
    int from_batch = scales ? 8 : 2; /* smaller batches are faster without AMX */
    if (level == LEVEL_AMX && batch < from_batch) level = LEVEL_AVX512;
    if (scales && level != LEVEL_AMX) return multiply_int8(level, &w, x, batch, bias, y, threads);
    return multiply_bf16(level, &w, x, batch, bias, y, threads);
}

/* Rows `from` to `to` of the matrix, dense, to `out` (to - from) x columns. `from` is a multiple of 16. */
EXPORT void secateur_unpack(int level, const uint32_t *masks, const void *values, const int64_t *offsets,
                            const float *scales, int64_t columns, int64_t from, int64_t to, uint16_t *out, int threads) {
    matrix_t w = {masks, values, offsets, scales, to, columns};
    unpacking_t unpacking = {&w, level, from, out};
    in_parallel(unpack_panels, &unpacking, (to - from + ROWS - 1) / ROWS, threads);
}
