/* Dense products in the style of the packed kernels, to tell what sparsity gains from what the kernel gains.
 *
 * The same panels of 16 rows x 2 columns, prefetch and sums, with every weight stored: bfloat16 by `vdpbf16ps`, int8 by
 * `vpdpwssd` with inputs of 16 bits.
 */

#include <immintrin.h>
#include <stdint.h>

#define AVX512                                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx512vnni")))
enum { AHEAD = 2048 };

AVX512 void dense_bf16(const uint16_t *w, int64_t rows, int64_t columns, const uint32_t *x, float *y) {
    int64_t blocks = columns / 2;
    for (int64_t panel = 0; panel < rows / 16; panel++, w += 16 * columns) {
        __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t block = 0; block < blocks; block += 4)
            for (int k = 0; k < 4; k++) {
                const uint16_t *at = w + 32 * (block + k);
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                __m512i pair = _mm512_set1_epi32((int)x[block + k]);
                sum[k] = _mm512_dpbf16_ps(sum[k], (__m512bh)_mm512_loadu_si512(at), (__m512bh)pair);
            }
        __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
        _mm512_storeu_ps(y + 16 * panel, total);
    }
}

AVX512 void dense_int8(const int8_t *w, int64_t rows, int64_t columns, const uint32_t *x, float *y) {
    int64_t blocks = columns / 2;
    for (int64_t panel = 0; panel < rows / 16; panel++, w += 16 * columns) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t start = 0; start < blocks; start += 1024) {
            int64_t end = blocks < start + 1024 ? blocks : start + 1024;
            __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                              _mm512_setzero_si512()};
            for (int64_t block = start; block < end; block += 4)
                for (int k = 0; k < 4; k++) {
                    const int8_t *at = w + 32 * (block + k);
                    if (!(k & 1)) _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at));
                    sum[k] = _mm512_dpwssd_epi32(sum[k], wide, _mm512_set1_epi32((int)x[block + k]));
                }
            for (int k = 0; k < 4; k++) total = _mm512_add_ps(total, _mm512_cvtepi32_ps(sum[k]));
        }
        _mm512_storeu_ps(y + 16 * panel, total);
    }
}
