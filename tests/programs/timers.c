/* Timers and the descriptors that count: each round ends only when every one of them has said exactly
 * what it must. */
#include "guest.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/time.h>
#include <sys/timerfd.h>

static volatile sig_atomic_t alarms, expirations;

static void on_alarm(int signal_number) {
    (void)signal_number;
    alarms++;
}

static void on_timer(int signal_number, siginfo_t *info, void *context) {
    (void)context;
    if (signal_number == SIGRTMIN && info->si_value.sival_int == 77) expirations++;
}

static void one_timerfd(int fd) {
    struct itimerspec in_5_ms = {.it_value.tv_nsec = 5000000};
    double start = monotonic();
    CHECK(timerfd_settime(fd, 0, &in_5_ms, NULL) == 0);
    uint64_t times = 0;
    ssize_t n;
    do {
        n = read(fd, &times, sizeof times);
    } while (n < 0 && errno == EINTR);
    CHECK(n == sizeof times && times == 1);
    CHECK(monotonic() - start >= 0.005);
    struct pollfd polled = {.fd = fd, .events = POLLIN};
    CHECK(poll(&polled, 1, 0) == 0);
}

static void one_alarm(void) {
    int before = alarms;
    struct itimerval in_4_ms = {.it_value.tv_usec = 4000};
    double start = monotonic();
    sigset_t blocked, old;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGALRM);
    CHECK(sigprocmask(SIG_BLOCK, &blocked, &old) == 0);
    CHECK(setitimer(ITIMER_REAL, &in_4_ms, NULL) == 0);
    while (alarms == before) sigsuspend(&old);
    CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
    CHECK(alarms == before + 1);
    CHECK(monotonic() - start >= 0.004);
}

static void one_posix_timer(timer_t timer) {
    int before = expirations;
    struct itimerspec in_3_ms = {.it_value.tv_nsec = 3000000};
    sigset_t blocked, old;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGRTMIN);
    CHECK(sigprocmask(SIG_BLOCK, &blocked, &old) == 0);
    CHECK(timer_settime(timer, 0, &in_3_ms, NULL) == 0);
    while (expirations == before) sigsuspend(&old);
    CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
    CHECK(expirations == before + 1);
    struct itimerspec left;
    CHECK(timer_gettime(timer, &left) == 0);
    CHECK(left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0);
}

static void sleeps(void) {
    double start = monotonic();
    struct timespec left = {.tv_nsec = 2000000};
    while (nanosleep(&left, &left) != 0) CHECK(errno == EINTR);
    CHECK(monotonic() - start >= 0.002);
    struct timespec until;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &until) == 0);
    until.tv_nsec += 2000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) != 0) {}
    CHECK(monotonic() >= (double)until.tv_sec + (double)until.tv_nsec / 1e9 - 1e-6);
    start = monotonic();
    int n;
    do {
        n = poll(NULL, 0, 2);
    } while (n < 0 && errno == EINTR);
    CHECK(n == 0 && monotonic() - start >= 0.002);
    struct timeval wait = {.tv_usec = 2000};
    do {
        n = select(0, NULL, NULL, NULL, &wait);
    } while (n < 0 && errno == EINTR);
    CHECK(n == 0);
}

static void one_signalfd(int fd, long round) {
    union sigval value = {.sival_int = (int)round};
    CHECK(sigqueue(getpid(), SIGUSR2, value) == 0);
    struct signalfd_siginfo info;
    ssize_t n;
    do {
        n = read(fd, &info, sizeof info);
    } while (n < 0 && errno == EINTR);
    CHECK(n == sizeof info && info.ssi_signo == SIGUSR2 && info.ssi_int == (int)round);
    CHECK(read(fd, &info, sizeof info) < 0 && errno == EAGAIN);
}

static void count_events(int event, int epoll, const int pipe_ends[2], long round) {
    uint64_t value = (uint64_t)round, got = 0;
    CHECK(write(event, &value, sizeof value) == sizeof value);
    value = 2;
    CHECK(write(event, &value, sizeof value) == sizeof value);
    struct epoll_event ready;
    int n;
    do {
        n = epoll_wait(epoll, &ready, 1, 1000);
    } while (n < 0 && errno == EINTR);
    CHECK(n == 1 && ready.data.fd == event);
    CHECK(read(event, &got, sizeof got) == sizeof got && got == (uint64_t)round + 2);
    CHECK(read(event, &got, sizeof got) < 0 && errno == EAGAIN);

    char text[32], back[64];
    int length = snprintf(text, sizeof text, "round %ld", round);
    CHECK(write(pipe_ends[1], text, (size_t)length) == length);
    fd_set readable;
    FD_ZERO(&readable);
    FD_SET(pipe_ends[0], &readable);
    struct timeval wait = {.tv_sec = 1};
    CHECK(select(pipe_ends[0] + 1, &readable, NULL, NULL, &wait) == 1);
    CHECK(read(pipe_ends[0], back, sizeof back) == length && memcmp(text, back, (size_t)length) == 0);
}

int main(void) {
    struct sigaction action = {.sa_handler = on_alarm};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    struct sigaction timed = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGRTMIN, &timed, NULL) == 0);
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN, .sigev_value.sival_int = 77};
    timer_t timer;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    int timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    sigset_t for_fd;
    sigemptyset(&for_fd);
    sigaddset(&for_fd, SIGUSR2);
    CHECK(sigprocmask(SIG_BLOCK, &for_fd, NULL) == 0);
    int signal_fd = signalfd(-1, &for_fd, SFD_CLOEXEC | SFD_NONBLOCK);
    int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int pipe_ends[2];
    CHECK(timer_fd >= 0 && signal_fd >= 0 && event_fd >= 0 && epoll >= 0 && pipe2(pipe_ends, O_CLOEXEC) == 0);
    struct epoll_event watch = {.events = EPOLLIN, .data.fd = event_fd};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, event_fd, &watch) == 0);
    /* A timer that runs on through every round: what it has counted must agree with the clock. */
    int steady = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct itimerspec each_10_ms = {.it_value.tv_nsec = 10000000, .it_interval.tv_nsec = 10000000};
    double before = monotonic(), latest = before;
    CHECK(steady >= 0 && timerfd_settime(steady, 0, &each_10_ms, NULL) == 0);
    double after = monotonic();
    uint64_t ticks = 0;
    say("ready 0\n");
    long round = 0;
    while (!stop_requested()) {
        round++;
        one_timerfd(timer_fd);
        one_alarm();
        one_posix_timer(timer);
        sleeps();
        one_signalfd(signal_fd, round);
        count_events(event_fd, epoll, pipe_ends, round);
        double now = monotonic();
        CHECK(now >= latest);
        latest = now;
        uint64_t more = 0;
        if (read(steady, &more, sizeof more) < 0) CHECK(errno == EAGAIN);
        ticks += more;
        /* A timer that was made again from what the kernel said of it may be a little off, and never by a tick. */
        CHECK((double)ticks * 0.010 <= monotonic() - before + 0.002);
        CHECK((double)(ticks + 1) * 0.010 >= now - after - 0.002);
        CHECK(alarms == round && expirations == round);
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
