/* Computes without a system call until SIGALRM comes, each round: `setitimer; while (1)`. */
#include "guest.h"
#include <sys/time.h>

static volatile sig_atomic_t alarms;

static void on_alarm(int signal_number) {
    (void)signal_number;
    alarms++;
}

int main(void) {
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    say("ready 0\n");
    long round = 0;
    volatile uint64_t spun = 0;
    while (!stop_requested()) {
        struct itimerval in_20_ms = {.it_value.tv_usec = 20000};
        CHECK(setitimer(ITIMER_REAL, &in_20_ms, NULL) == 0);
        while (alarms == round) spun++;
        round++;
        CHECK(alarms == round);
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
