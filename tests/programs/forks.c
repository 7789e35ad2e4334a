/* Forks a child each round; the child computes and reports through a pipe and its exit status.
 *
 * Every report, every status and every SIGCHLD has to come, once. */
#include "guest.h"
#include <sys/wait.h>

static volatile sig_atomic_t ended;

static void on_child(int signal_number) {
    (void)signal_number;
    ended++;
}

static uint64_t work(long round) {
    uint64_t value = (uint64_t)round;
    for (int i = 0; i < 500000; i++) value = mix(value);
    return value;
}

int main(void) {
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGCHLD, &action, NULL) == 0);
    say("ready 0\n");
    long round = 0;
    while (!stop_requested()) {
        round++;
        int ends[2];
        CHECK(pipe2(ends, O_CLOEXEC) == 0);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            close(ends[0]);
            uint64_t value = work(round);
            write_all(ends[1], &value, sizeof value);
            _exit((int)(round % 100));
        }
        CHECK(close(ends[1]) == 0);
        uint64_t value = 0;
        size_t have = 0;
        while (have < sizeof value) {
            ssize_t n = read(ends[0], (char *)&value + have, sizeof value - have);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) fail("round %ld: the child's report ended after %zu bytes", round, have);
            have += (size_t)n;
        }
        char extra;
        ssize_t n;
        do {
            n = read(ends[0], &extra, 1);
        } while (n < 0 && errno == EINTR);
        CHECK(n == 0);
        CHECK(close(ends[0]) == 0);
        if (value != work(round)) fail("round %ld: the child computed %llx", round, (unsigned long long)value);
        int status = 0;
        pid_t got;
        do {
            got = waitpid(child, &status, 0);
        } while (got < 0 && errno == EINTR);
        if (got != child) fail("round %ld: waitpid(%d) gave %d", round, (int)child, (int)got);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != round % 100)
            fail("round %ld: status %x", round, (unsigned)status);
        CHECK(waitpid(-1, &status, WNOHANG) < 0 && errno == ECHILD);
        if (ended != round) fail("round %ld: %d SIGCHLD", round, (int)ended);
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
