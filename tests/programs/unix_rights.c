/* Line server on a Unix socket that passes descriptors both ways.
 *
 * usage: unix_rights PATH
 * `TEXT` is answered with `COUNT TOTAL TEXT`. `take TEXT` comes with a descriptor: the server writes
 * `took TEXT` into it and closes it before it answers. `give TEXT` is answered with a descriptor attached:
 * the read end of a pipe that holds `gave TEXT` and is closed at the other end.
 * `keep TEXT` comes with a descriptor that the server keeps; `tell TEXT` writes `told TEXT` into all of these. `post TEXT` comes with one
 * that is sent with the line into a pair of sockets of the server's, and closed; `fetch TEXT` takes the oldest of these
 * from there, writes `fetched TEXT` into it and closes it.
 */
#include "guest.h"
#include <poll.h>
#include <sys/un.h>

#define CONNECTIONS_MAX 64
#define LINE_MAX_BYTES 65536
#define KEPT_MAX 256

static struct {
    unsigned long count;
    size_t length;
    int passed;
    char line[LINE_MAX_BYTES];
} connections[CONNECTIONS_MAX];
static struct pollfd polled[CONNECTIONS_MAX];
static unsigned long total;
static int kept[KEPT_MAX], kept_count;
static int pair[2];

static void send_with(int fd, const char *data, size_t length, int attached) {
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {.iov_base = (void *)data, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (attached >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &attached, sizeof attached);
    }
    CHECK(sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)length);
}

static void write_into(int fd, const char *verb, const char *text) {
    static char line[LINE_MAX_BYTES + 100];
    int length = snprintf(line, sizeof line, "%s %s\n", verb, text);
    write_all(fd, line, (size_t)length);
}

/* A message of the pair, and the descriptor in it. */
static int fetch(void) {
    char control[CMSG_SPACE(sizeof(int))], line[LINE_MAX_BYTES];
    struct iovec part = {.iov_base = line, .iov_len = sizeof line};
    struct mmsghdr messages[1] = {{.msg_hdr = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control}}};
    CHECK(recvmmsg(pair[1], messages, 1, MSG_CMSG_CLOEXEC, NULL) == 1 && messages[0].msg_len > 0);
    struct cmsghdr *header = CMSG_FIRSTHDR(&messages[0].msg_hdr);
    CHECK(header && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int)));
    int fd;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

static int passed_with(int i) {
    int fd = connections[i].passed;
    CHECK(fd >= 0);
    connections[i].passed = -1;
    return fd;
}

static void answer(int i, const char *line) {
    static char reply[LINE_MAX_BYTES + 100];
    int attached = -1;
    if (strncmp(line, "take ", 5) == 0) {
        int fd = passed_with(i);
        write_into(fd, "took", line + 5);
        CHECK(close(fd) == 0);
    } else if (strncmp(line, "keep ", 5) == 0) {
        CHECK(kept_count < KEPT_MAX);
        kept[kept_count++] = passed_with(i);
    } else if (strncmp(line, "tell ", 5) == 0) {
        for (int k = 0; k < kept_count; k++) write_into(kept[k], "told", line + 5);
    } else if (strncmp(line, "post ", 5) == 0) {
        if (pair[0] == pair[1]) CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
        int fd = passed_with(i);
        send_with(pair[0], line, strlen(line), fd);
        CHECK(close(fd) == 0);
    } else if (strncmp(line, "fetch ", 6) == 0) {
        int fd = fetch();
        write_into(fd, "fetched", line + 6);
        CHECK(close(fd) == 0);
    } else if (strncmp(line, "give ", 5) == 0) {
        int ends[2];
        CHECK(pipe2(ends, O_CLOEXEC) == 0);
        int length = snprintf(reply, sizeof reply, "gave %s\n", line + 5);
        write_all(ends[1], reply, (size_t)length);
        CHECK(close(ends[1]) == 0);
        attached = ends[0];
    }
    int length = snprintf(reply, sizeof reply, "%lu %lu %s\n", ++connections[i].count, ++total, line);
    send_with(polled[i].fd, reply, (size_t)length, attached);
    if (attached >= 0) CHECK(close(attached) == 0);
}

/* Reads once and answers the whole lines. Returns 0 at the end of the connection. */
static int serve(int i) {
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {.iov_base = connections[i].line + connections[i].length,
                         .iov_len = LINE_MAX_BYTES - 1 - connections[i].length};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(polled[i].fd, &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) return 1;
    if (n <= 0) return 0;
    for (struct cmsghdr *h = CMSG_FIRSTHDR(&message); h; h = CMSG_NXTHDR(&message, h))
        if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS)
            memcpy(&connections[i].passed, CMSG_DATA(h), sizeof(int));
    connections[i].length += (size_t)n;
    char *end;
    while ((end = memchr(connections[i].line, '\n', connections[i].length))) {
        *end = 0;
        answer(i, connections[i].line);
        size_t used = (size_t)(end - connections[i].line) + 1;
        memmove(connections[i].line, end + 1, connections[i].length - used);
        connections[i].length -= used;
    }
    return 1;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(listener >= 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CHECK(strlen(argv[1]) < sizeof address.sun_path);
    strcpy(address.sun_path, argv[1]);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(listener, 64) == 0);
    say("ready 0\n");
    notify("READY=1");
    for (int i = 0; i < CONNECTIONS_MAX; i++) polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    polled[0].fd = listener;
    for (;;) {
        int n = poll(polled, CONNECTIONS_MAX, -1);
        if (n < 0) {
            CHECK(errno == EINTR);
            continue;
        }
        for (int i = 1; i < CONNECTIONS_MAX; i++) {
            if (polled[i].fd < 0 || polled[i].revents == 0 || serve(i)) continue;
            close(polled[i].fd);
            polled[i].fd = -1;
        }
        if (polled[0].revents == 0) continue;
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) continue;
        int slot = 1;
        while (slot < CONNECTIONS_MAX && polled[slot].fd >= 0) slot++;
        CHECK(slot < CONNECTIONS_MAX);
        polled[slot] = (struct pollfd){.fd = fd, .events = POLLIN};
        connections[slot].count = 0;
        connections[slot].length = 0;
        connections[slot].passed = -1;
    }
}
