/* Maps, unmaps, moves, protects and drops memory, and verifies what it holds each round. */
#include "guest.h"
#include <sys/mman.h>

#define PAGE 4096u
#define PAGES 64u

static void fill(uint64_t *at, size_t words, uint64_t seed) {
    for (size_t i = 0; i < words; i++) at[i] = mix(seed + i);
}

static void verify(const uint64_t *at, size_t words, uint64_t seed, const char *what) {
    for (size_t i = 0; i < words; i++)
        if (at[i] != mix(seed + i)) fail("%s: word %zu of seed %llu differs", what, i, (unsigned long long)seed);
}

int main(void) {
    int fd = open("mapped", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    char text[PAGE * 4];
    for (size_t i = 0; i < sizeof text; i++) text[i] = (char)('a' + i % 26);
    write_all(fd, text, sizeof text);
    char *file = mmap(NULL, sizeof text, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(file != MAP_FAILED);
    uint64_t *kept = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(kept != MAP_FAILED);
    fill(kept, PAGES * PAGE / 8, 0);
    uint64_t *shared = mmap(NULL, PAGE * 2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    char *heap = sbrk(0);
    size_t heap_used = 0;
    say("ready 0\n");
    long round = 0;
    while (!stop_requested()) {
        uint64_t seed = (uint64_t)round * 1000003u;
        verify(kept, PAGES * PAGE / 8, seed, "kept memory");
        CHECK(round == 0 || shared[7] == (uint64_t)round);
        round++;
        seed = (uint64_t)round * 1000003u;
        fill(kept, PAGES * PAGE / 8, seed);
        shared[7] = (uint64_t)round;

        /* A private file mapping: our write stays ours, the rest is the file's. */
        size_t at = (size_t)round % sizeof text;
        file[at] = '#';
        for (size_t i = 0; i < sizeof text; i += 97) CHECK(file[i] == '#' || file[i] == text[i]);
        char there;
        CHECK(pread(fd, &there, 1, (off_t)at) == 1 && there == text[at]);
        CHECK(madvise(file, PAGE, MADV_DONTNEED) == 0);
        CHECK(memcmp(file, text, PAGE) == 0);

        /* Grow, move, protect. */
        uint64_t *moved = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(moved != MAP_FAILED);
        fill(moved, 4 * PAGE / 8, seed);
        moved = mremap(moved, 4 * PAGE, 32 * PAGE, MREMAP_MAYMOVE);
        CHECK(moved != MAP_FAILED);
        verify(moved, 4 * PAGE / 8, seed, "moved memory");
        CHECK(moved[4 * PAGE / 8] == 0 && moved[32 * PAGE / 8 - 1] == 0);
        CHECK(mprotect(moved, 2 * PAGE, PROT_READ) == 0);
        verify(moved, 4 * PAGE / 8, seed, "read-only memory");
        CHECK(mprotect(moved, 2 * PAGE, PROT_READ | PROT_WRITE) == 0);
        CHECK(madvise(moved, PAGE, MADV_DONTNEED) == 0);
        CHECK(moved[0] == 0 && moved[PAGE / 8] == mix(seed + PAGE / 8));
        CHECK(munmap((char *)moved + PAGE, PAGE) == 0);
        CHECK(munmap(moved, 32 * PAGE) == 0);

        /* The heap grows for 64 rounds, then falls back. */
        if (heap_used == 64 * PAGE) {
            for (size_t page = 0; page < 64; page++)
                CHECK(((uint64_t *)heap)[page * PAGE / 8] == mix((uint64_t)(round - 64) + page));
            CHECK(sbrk(-(intptr_t)heap_used) != (void *)-1);
            heap_used = 0;
        }
        CHECK(sbrk(PAGE) == heap + heap_used);
        *(uint64_t *)(heap + heap_used) = mix((uint64_t)round);
        heap_used += PAGE;
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
