/* Several messages in a call: one thread asks for two at a time, and another sends them one after the other.
 *
 * Without MSG_WAITFORONE the kernel waits until there are as many as were asked for; a caller must do with fewer, as when a signal
 * comes.
 */
#include "guest.h"
#include <pthread.h>
#include <sched.h>

static int ends[2];

static struct mmsghdr message(struct iovec *piece) {
    return (struct mmsghdr){.msg_hdr = {.msg_iov = piece, .msg_iovlen = 1}};
}

static void *send_all(void *unused) {
    for (uint32_t n = 1;; n++) {
        struct iovec piece = {&n, sizeof n};
        struct mmsghdr one = message(&piece);
        CHECK(sendmmsg(ends[0], &one, 1, 0) == 1 && one.msg_len == sizeof n);
        sched_yield();
    }
    return unused;
}

int main(void) {
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, send_all, NULL) == 0);
    say("ready 0\n");
    long round = 0;
    uint32_t want = 1;
    while (!stop_requested()) {
        round++;
        uint32_t numbers[2] = {0, 0};
        struct iovec pieces[2] = {{&numbers[0], sizeof numbers[0]}, {&numbers[1], sizeof numbers[1]}};
        struct mmsghdr two[2] = {message(&pieces[0]), message(&pieces[1])};
        int got = recvmmsg(ends[1], two, 2, 0, NULL);
        if (got < 1) fail("recvmmsg returns %d", got);
        for (int i = 0; i < got; i++, want++) {
            CHECK(two[i].msg_len == sizeof want);
            if (numbers[i] != want) fail("message %u instead of %u", numbers[i], want);
        }
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
