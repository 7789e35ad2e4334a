/* One thread spins on a variable until the other has set it: no call is made while it waits. */
#include "guest.h"
#include <pthread.h>
#include <stdatomic.h>

static atomic_long asked, done;

static void *work(void *unused) {
    (void)unused;
    uint64_t value = 0;
    for (long round = 1;; round++) {
        while (atomic_load(&asked) < round) {}
        for (int i = 0; i < 100000; i++) value = mix(value);
        atomic_store(&done, value == 0 ? 0 : round);
    }
    return NULL;
}

int main(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, work, NULL) == 0);
    say("ready 0\n");
    long round = 0;
    while (!stop_requested()) {
        round++;
        atomic_store(&asked, round);
        while (atomic_load(&done) != round) {}
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
