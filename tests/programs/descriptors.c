/* Descriptors come and go, files are written and read by position, connections are taken and served; every
 * effect that outlives the process is counted, so that one made twice, or not at all, is found.
 *
 * Each round appends a line to a file and reads it back through a position of its own, sends a file by
 * sendfile over a connection to itself, and gives all descriptors back.
 */
#include "guest.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>

#define PAGE 4096
#define FILE_BYTES 3000

static int listener, set, content;
static struct sockaddr_in address;

/* Appends a line; the file must have grown by it, and by nothing else. */
static void append_line(int ledger, long number, off_t *size) {
    char line[32];
    int n = snprintf(line, sizeof line, "line %ld\n", number);
    CHECK(write(ledger, line, (size_t)n) == n);
    *size += n;
    struct stat now;
    CHECK(fstat(ledger, &now) == 0);
    if (now.st_size != *size) fail("the ledger has %ld bytes instead of %ld", (long)now.st_size, (long)*size);
}

/* Reads the last line and the end, by a descriptor whose position moves. */
static void read_back(long number, off_t size) {
    char want[32], got[32];
    int n = snprintf(want, sizeof want, "line %ld\n", number);
    int fd = open("ledger", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(lseek(fd, size - n, SEEK_SET) == size - n);
    CHECK(read(fd, got, 4) == 4);
    CHECK(read(fd, got + 4, sizeof got - 4) == n - 4);
    if (memcmp(want, got, (size_t)n) != 0) fail("read %.*s instead of %s", n, got, want);
    CHECK(read(fd, got, sizeof got) == 0);
    CHECK(close(fd) == 0);
    CHECK(fcntl(fd, F_GETFD) == -1 && errno == EBADF);
}

/* A connection to ourselves: one end sends a file, the other must get it once. */
static void serve_file(void) {
    int near = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(near >= 0);
    CHECK(connect(near, (struct sockaddr *)&address, sizeof address) == 0);
    struct pollfd ready = {.fd = listener, .events = POLLIN};
    CHECK(poll(&ready, 1, 10000) == 1);
    struct sockaddr_in peer, self;
    socklen_t length = sizeof peer;
    int far = accept4(listener, (struct sockaddr *)&peer, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    CHECK(far >= 0 && length == sizeof peer);
    CHECK(accept4(listener, NULL, NULL, SOCK_NONBLOCK) == -1 && errno == EAGAIN);
    length = sizeof self;
    CHECK(getsockname(near, (struct sockaddr *)&self, &length) == 0);
    CHECK(peer.sin_port == self.sin_port);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 7};
    CHECK(epoll_ctl(set, EPOLL_CTL_ADD, far, &event) == 0);
    CHECK(epoll_ctl(set, EPOLL_CTL_ADD, far, &event) == -1 && errno == EEXIST);
    CHECK(send(near, "now", 3, MSG_NOSIGNAL) == 3);
    CHECK(epoll_wait(set, &event, 1, 10000) == 1 && event.data.u64 == 7);
    char text[FILE_BYTES + 100], want[FILE_BYTES];
    CHECK(read(far, text, sizeof text) == 3);
    off_t offset = 100;
    CHECK(sendfile(far, content, &offset, FILE_BYTES - 100) == FILE_BYTES - 100);
    CHECK(offset == FILE_BYTES);
    CHECK(close(far) == 0);
    CHECK(pread(content, want, FILE_BYTES, 0) == FILE_BYTES);
    size_t got = 0;
    for (;;) {
        ssize_t n = recv(near, text + got, sizeof text - got, 0);
        CHECK(n >= 0);
        if (n == 0) break;
        got += (size_t)n;
    }
    if (got != FILE_BYTES - 100) fail("%zu bytes came of %d", got, FILE_BYTES - 100);
    CHECK(memcmp(text, want + 100, got) == 0);
    CHECK(close(near) == 0);
}

/* Memory of its own, moved and given back. */
static void use_memory(long number) {
    unsigned char *at = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    memset(at, (int)number, 8 * PAGE);
    CHECK(madvise(at + PAGE, PAGE, MADV_DONTNEED) == 0);
    CHECK(madvise(at + 3 * PAGE, PAGE, MADV_FREE) == 0);
    CHECK(at[3 * PAGE] == 0 || at[3 * PAGE] == (unsigned char)number);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_READ) == 0);
    CHECK(munmap(at + 2 * PAGE, 6 * PAGE) == 0);
    at = mremap(at, 2 * PAGE, 32 * PAGE, MREMAP_MAYMOVE);
    CHECK(at != MAP_FAILED);
    CHECK(at[0] == (unsigned char)number && at[PAGE] == 0 && at[31 * PAGE] == 0);
    CHECK(munmap(at, 32 * PAGE) == 0);
}

int main(void) {
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CHECK(listener >= 0);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(listener, 16) == 0);
    socklen_t length = sizeof address;
    CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    CHECK((set = epoll_create1(EPOLL_CLOEXEC)) >= 0);
    CHECK((content = open("content", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)) >= 0);
    for (uint64_t i = 0; i < FILE_BYTES / 8; i++) {
        uint64_t word = mix(i);
        CHECK(pwrite(content, &word, 8, (off_t)i * 8) == 8);
    }
    int ledger = open("ledger", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    CHECK(ledger >= 0);
    int lowest = dup(ledger);
    CHECK(lowest >= 0 && close(lowest) == 0);
    off_t size = 0;
    long number = 0;
    say("ready 0\n");
    while (!stop_requested()) {
        number++;
        append_line(ledger, number, &size);
        read_back(number, size);
        serve_file();
        use_memory(number);
        int fd = dup(ledger);
        if (fd != lowest) fail("descriptor %d is the lowest free one instead of %d", fd, lowest);
        CHECK(close(fd) == 0);
        say("round %ld\n", number);
    }
    say("ok %ld\n", number);
    return 0;
}
