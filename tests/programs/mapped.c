/* Memory that is mapped from files which lose their names or are put in the place of others meanwhile: the program's own
 * code, a page for each function, and data.
 *
 * `data` is mapped privately and shared, both only to be read; `gone` is mapped to be written and has no name any more.
 * Each round looks at a page of each.
 */
#include "guest.h"
#include <sys/mman.h>

#define PAGE 4096
#define PAGES 64

#define FUNCTION(n) __attribute__((aligned(PAGE), noinline)) static uint64_t function##n(uint64_t x) { return mix(x + n); }
#define EIGHT(m) FUNCTION(m##0) FUNCTION(m##1) FUNCTION(m##2) FUNCTION(m##3) FUNCTION(m##4) FUNCTION(m##5) FUNCTION(m##6) FUNCTION(m##7)
EIGHT(1) EIGHT(2) EIGHT(3) EIGHT(4)
#define NAMES(m) function##m##0, function##m##1, function##m##2, function##m##3, function##m##4, function##m##5, function##m##6, function##m##7
static uint64_t (*const functions[])(uint64_t) = {NAMES(1), NAMES(2), NAMES(3), NAMES(4)};
static const int numbers[] = {10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 22, 23, 24, 25, 26, 27,
                              30, 31, 32, 33, 34, 35, 36, 37, 40, 41, 42, 43, 44, 45, 46, 47};

/* The word of a page of the file that is mapped from page `first` on. */
static uint64_t word(const char *at, int first, int page) {
    uint64_t value;
    memcpy(&value, at + (page - first) * PAGE + 8 * (page % 500), sizeof value);
    return value;
}

/* A file whose pages have each a word of their own; the last page is not whole. */
static int make(const char *name, uint64_t seed) {
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    for (int page = 0; page < PAGES; page++) {
        uint64_t value = mix(seed + (uint64_t)page);
        CHECK(pwrite(fd, &value, sizeof value, page * PAGE + 8 * (page % 500)) == sizeof value);
    }
    return fd;
}

int main(void) {
    int data = make("data", 1000), gone = make("gone", 2000);
    const char *private = mmap(NULL, (PAGES - 3) * PAGE, PROT_READ, MAP_PRIVATE, data, 3 * PAGE);
    const char *shared = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, data, 0);
    char *written = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, gone, 0);
    CHECK(private != MAP_FAILED && shared != MAP_FAILED && written != MAP_FAILED);
    CHECK(close(data) == 0 && close(gone) == 0 && unlink("gone") == 0);
    say("ready 0\n");
    long round = 0;
    while (!stop_requested()) {
        round++;
        int page = (int)(mix((uint64_t)round) % PAGES), which = (int)(round % 32);
        if (page >= 3 && word(private, 3, page) != mix(1000 + (uint64_t)page)) fail("page %d of data, private", page);
        if (word(shared, 0, page) != mix(1000 + (uint64_t)page)) fail("page %d of data, shared", page);
        if (page % 2 == 0 && word(written, 0, page) != mix(2000 + (uint64_t)page)) fail("page %d of gone", page);
        if (page % 2 == 1) written[page * PAGE] = (char)round;
        uint64_t x = (uint64_t)round;
        if (functions[which](x) != mix(x + (uint64_t)numbers[which])) fail("function %d", which);
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
