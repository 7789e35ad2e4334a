/* What the guest programs share: failing loudly, saying that they are ready, counting rounds.
 *
 * A self-checking program runs rounds until a file named `stop` appears in its working directory, prints
 * one line `round N` for each, and ends with `ok N` and status 0. Whatever it finds wrong ends it with a
 * line `FAIL ...` on stderr and status 1. The harness checks that the rounds are there exactly once.
 */
#ifndef GUEST_H
#define GUEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static inline void fail(const char *format, ...) {
    int error = errno;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    dprintf(2, "FAIL %s (errno %d: %s)\n", text, error, strerror(error));
    exit(1);
}

#define CHECK(condition) \
    do { \
        if (!(condition)) fail("%s:%d: %s", __FILE__, __LINE__, #condition); \
    } while (0)

/* Writes all of it, in as few calls as the kernel allows. */
static inline void write_all(int fd, const void *data, size_t length) {
    const char *at = data;
    while (length > 0) {
        ssize_t n = write(fd, at, length);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("write to %d", fd);
        at += n;
        length -= (size_t)n;
    }
}

/* Answers a line as the echo servers do: numbers of the answer on this connection and of all, the line, and the process
 * id where it is asked for. */
static inline void answer_line(int fd, unsigned long served, unsigned long total, const char *line, size_t length) {
    char head[80], tail[32] = "\n";
    int head_length = snprintf(head, sizeof head, "%lu %lu ", served, total);
    if (strcmp(line, "pid") == 0) snprintf(tail, sizeof tail, " %d\n", (int)getpid());
    size_t size = (size_t)head_length + length + strlen(tail);
    char *reply = malloc(size + 1);
    if (!reply) fail("no memory");
    memcpy(reply, head, (size_t)head_length);
    memcpy(reply + head_length, line, length);
    strcpy(reply + head_length + length, tail);
    write_all(fd, reply, size);
    free(reply);
}

static inline void say(const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    write_all(1, text, (size_t)length);
}

static inline int stop_requested(void) { return access("stop", F_OK) == 0; }

/* A listening TCP socket on the loopback; says `ready PORT`. */
static inline int listen_tcp(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    int one = 1;
    CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(fd, 1024) == 0);
    socklen_t length = sizeof address;
    CHECK(getsockname(fd, (struct sockaddr *)&address, &length) == 0);
    say("ready %d\n", ntohs(address.sin_port));
    return fd;
}

static inline double monotonic(void) {
    struct timespec now;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* A step of a fixed pseudo-random sequence (splitmix64). */
static inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

#endif
