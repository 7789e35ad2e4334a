/* Line echo server that waits in every way there is: a thread for each connection, whose number says how it waits.
 *
 * usage: waits_echo [PORT]
 * Same answers as epoll_echo. Connections are accepted by a call that blocks; data come by recvmsg in blocking mode
 * or after select, pselect, epoll_pwait2 or ppoll with a timeout, of which the odd ones run out now and then. What these
 * calls leave behind (sets, the time that is left, the message's header) is checked. */
#include "guest.h"
#include <pthread.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long total;

static unsigned long draw(void) {
    pthread_mutex_lock(&lock);
    unsigned long number = ++total;
    pthread_mutex_unlock(&lock);
    return number;
}

enum way { BLOCKING, SELECT, PSELECT, EPOLL, POLL, WAYS };

/* Waits for data in this way, perhaps some milliseconds only; true when there may be some. */
static int wait_for(int fd, int set, enum way way, long milliseconds) {
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    fd_set in, out;
    FD_ZERO(&in);
    FD_ZERO(&out);
    int n = 1;
    switch (way) {
    case BLOCKING:
        return 1;
    case SELECT: {
        FD_SET(fd, &in);
        struct timeval left = {time.tv_sec, time.tv_nsec / 1000};
        n = select(fd + 1, &in, &out, NULL, &left);
        CHECK(n < 0 || FD_ISSET(fd, &in) == (n == 1));
        CHECK(n < 0 || left.tv_sec * 1000 + left.tv_usec / 1000 <= milliseconds);
        CHECK(n != 0 || (left.tv_sec == 0 && left.tv_usec == 0));
        break;
    }
    case PSELECT:
        FD_SET(fd, &in);
        n = pselect(fd + 1, &in, NULL, NULL, &time, NULL);
        CHECK(n < 0 || FD_ISSET(fd, &in) == (n == 1));
        break;
    case EPOLL: {
        struct epoll_event event = {0};
        n = (int)syscall(SYS_epoll_pwait2, set, &event, 1, &time, NULL, 8);
        CHECK(n <= 0 || event.data.fd == fd);
        break;
    }
    case POLL: {
        struct pollfd entry = {fd, POLLIN, 0};
        n = ppoll(&entry, 1, &time, NULL);
        break;
    }
    default:
        fail("a way to wait");
    }
    CHECK(n >= 0 || errno == EINTR);
    return n > 0;
}

/* Takes what there is. */
static ssize_t take(int fd, char *to, size_t room) {
    struct iovec piece = {to, room};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_controllen = 77, .msg_flags = -1};
    ssize_t n = recvmsg(fd, &message, 0);
    if (n >= 0) CHECK(message.msg_controllen == 0 && message.msg_flags == 0);
    return n;
}

static void *serve(void *argument) {
    int fd = (int)(intptr_t)argument;
    static unsigned long connections;
    enum way way = (enum way)(__atomic_fetch_add(&connections, 1, __ATOMIC_SEQ_CST) % WAYS);
    int set = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    CHECK(set >= 0 && epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
    size_t room = 4 << 20, have = 0;
    char *line = malloc(room);
    CHECK(line != NULL);
    unsigned long served = 0;
    for (unsigned long turn = 0;; turn++) {
        if (!wait_for(fd, set, way, turn % 2 ? 1 : 1000)) continue;
        ssize_t n = take(fd, line + have, room - have);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        have += (size_t)n;
        char *end = memchr(line, '\n', have);
        while (end) {
            *end = 0;
            size_t length = (size_t)(end - line);
            served++;
            answer_line(fd, served, draw(), line, length);
            have -= length + 1;
            memmove(line, end + 1, have);
            end = memchr(line, '\n', have);
        }
        CHECK(have < room);
    }
    free(line);
    close(set);
    close(fd);
    return NULL;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_tcp(argc > 1 ? atoi(argv[1]) : 0);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
        CHECK(fd >= 0);
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) == 0);
        pthread_detach(thread);
    }
}
