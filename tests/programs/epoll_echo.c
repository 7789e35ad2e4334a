/* Line echo server, one thread, epoll.
 *
 * usage: epoll_echo [PORT [WORD]]
 * Each line `TEXT` is answered with `COUNT TOTAL TEXT`: how many lines this connection has sent, how many
 * the server has answered in all. `pid` is answered with the process id appended, `crash` is answered by a
 * store through a null pointer, `notify WORD` says WORD to the service manager.
 * Where a listening socket has been handed over, it is used. WORD is said to the service manager when it listens.
 * With ALPHABET in the environment that file is made of the bytes from 0 to 255, and the first byte of an answer is taken from there.
 */
#include "guest.h"
#include <sys/epoll.h>
#include <sys/sendfile.h>

struct connection {
    int fd;
    unsigned long count;
    char *in;
    size_t in_length, in_room;
    char *out;
    size_t out_length, out_room;
    int waits_for_room;
};

static unsigned long total;
static int epoll_fd;
static int alphabet = -1;

static void make_alphabet(const char *path) {
    unsigned char bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (unsigned char)i;
    CHECK((alphabet = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600)) >= 0);
    CHECK(write(alphabet, bytes, sizeof bytes) == sizeof bytes);
    CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR);
}

static ssize_t send_byte(int fd, unsigned char byte) {
    off_t at = byte;
    ssize_t n = sendfile(fd, alphabet, &at, 1);
    CHECK(at == byte + (n > 0 ? n : 0));
    return n;
}

static void cork(int fd, int on) {
    if (alphabet >= 0) CHECK(setsockopt(fd, IPPROTO_TCP, TCP_CORK, &on, sizeof on) == 0);
}

static void append(char **buffer, size_t *length, size_t *room, const char *data, size_t n) {
    if (*length + n > *room) {
        *room = (*length + n) * 2;
        *buffer = realloc(*buffer, *room);
        CHECK(*buffer != NULL);
    }
    memcpy(*buffer + *length, data, n);
    *length += n;
}

static void answer(struct connection *c, const char *line, size_t length) {
    char head[80];
    c->count++;
    total++;
    if (length == 5 && memcmp(line, "crash", 5) == 0) *(volatile int *)(uintptr_t)(c->count * 0) = 1;
    if (length > 7 && length < 2048 && memcmp(line, "notify ", 7) == 0) {
        char text[2048] = "";
        memcpy(text, line + 7, length - 7);
        notify(text);
    }
    int n = snprintf(head, sizeof head, "%lu %lu ", c->count, total);
    append(&c->out, &c->out_length, &c->out_room, head, (size_t)n);
    append(&c->out, &c->out_length, &c->out_room, line, length);
    if (length == 3 && memcmp(line, "pid", 3) == 0) {
        n = snprintf(head, sizeof head, " %d", (int)getpid());
        append(&c->out, &c->out_length, &c->out_room, head, (size_t)n);
    }
    append(&c->out, &c->out_length, &c->out_room, "\n", 1);
}

static void end(struct connection *c) {
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

/* Sends what is queued. Returns 0 when the connection is gone. */
static int flush(struct connection *c) {
    size_t sent = 0;
    cork(c->fd, 1);
    while (sent < c->out_length) {
        ssize_t n = alphabet >= 0 && sent == 0 ? send_byte(c->fd, (unsigned char)c->out[0])
                                               : send(c->fd, c->out + sent, c->out_length - sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) return 0;
        sent += (size_t)n;
    }
    cork(c->fd, 0);
    memmove(c->out, c->out + sent, c->out_length - sent);
    c->out_length -= sent;
    int wait = c->out_length > 0;
    if (wait != c->waits_for_room) {
        struct epoll_event event = {.events = EPOLLIN | (wait ? EPOLLOUT : 0), .data.ptr = c};
        CHECK(epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event) == 0);
        c->waits_for_room = wait;
    }
    return 1;
}

/* Reads and answers what has come. Returns 0 when the connection is gone. */
static int serve(struct connection *c) {
    char chunk[16384];
    for (;;) {
        ssize_t n = recv(c->fd, chunk, sizeof chunk, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0) return 0;
        append(&c->in, &c->in_length, &c->in_room, chunk, (size_t)n);
        if ((size_t)n < sizeof chunk) break;
    }
    size_t start = 0;
    for (;;) {
        char *end_of_line = memchr(c->in + start, '\n', c->in_length - start);
        if (!end_of_line) break;
        answer(c, c->in + start, (size_t)(end_of_line - c->in) - start);
        start = (size_t)(end_of_line - c->in) + 1;
    }
    memmove(c->in, c->in + start, c->in_length - start);
    c->in_length -= start;
    return flush(c);
}

static void take_new(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && errno == EINTR) continue;
        if (fd < 0 && (errno == EAGAIN || errno == ECONNABORTED)) return;
        CHECK(fd >= 0);
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = calloc(1, sizeof *c);
        CHECK(c != NULL);
        c->fd = fd;
        c->in = malloc(c->in_room = 64);
        c->out = malloc(c->out_room = 64);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        CHECK(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0);
    }
}

int main(int argc, char **argv) {
    int listener = handed_socket();
    if (listener < 0) listener = listen_tcp(argc > 1 ? atoi(argv[1]) : 0);
    CHECK(fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
    if (getenv("ALPHABET")) make_alphabet(getenv("ALPHABET"));
    if (argc > 2) notify(argv[2]);
    CHECK((epoll_fd = epoll_create1(EPOLL_CLOEXEC)) >= 0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    CHECK(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event) == 0);
    for (;;) {
        struct epoll_event events[64];
        int n = epoll_wait(epoll_fd, events, 64, -1);
        if (n < 0) {
            CHECK(errno == EINTR);
            continue;
        }
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                take_new(listener);
                continue;
            }
            int alive = 1;
            if (events[i].events & EPOLLOUT) alive = flush(c);
            if (alive && (events[i].events & ~(uint32_t)EPOLLOUT)) alive = serve(c);
            if (!alive) end(c);
        }
    }
}
