/* Datagram echo server: each `TEXT` is answered with `COUNT TOTAL TEXT`, counted for each sender.
 *
 * usage: udp_echo [PORT]
 */
#include "guest.h"

#define SENDERS_MAX 1024

static struct {
    struct sockaddr_in address;
    unsigned long count;
} senders[SENDERS_MAX];

static unsigned long *counter_of(const struct sockaddr_in *address) {
    for (int i = 0; i < SENDERS_MAX; i++) {
        if (senders[i].count == 0) senders[i].address = *address;
        if (senders[i].address.sin_port == address->sin_port &&
            senders[i].address.sin_addr.s_addr == address->sin_addr.s_addr)
            return &senders[i].count;
    }
    fail("more than %d senders", SENDERS_MAX);
    return NULL;
}

int main(int argc, char **argv) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)(argc > 1 ? atoi(argv[1]) : 0))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
    socklen_t length = sizeof address;
    CHECK(getsockname(fd, (struct sockaddr *)&address, &length) == 0);
    say("ready %d\n", ntohs(address.sin_port));
    for (unsigned long total = 1;; total++) {
        char in[4096], out[4200];
        struct sockaddr_in from;
        length = sizeof from;
        ssize_t n;
        do {
            n = recvfrom(fd, in, sizeof in, 0, (struct sockaddr *)&from, &length);
        } while (n < 0 && errno == EINTR);
        CHECK(n >= 0);
        unsigned long *count = counter_of(&from);
        ++*count;
        int head = snprintf(out, sizeof out, "%lu %lu ", *count, total);
        memcpy(out + head, in, (size_t)n);
        CHECK(sendto(fd, out, (size_t)(head + n), 0, (struct sockaddr *)&from, length) == head + n);
    }
}
