/* Descriptors of what /proc has about the process itself, kept open: they go on to mean this process, whatever has
 * become of the process that opened them.
 *
 * Its name is written and read through one of them, its directory is walked through another, its own descriptors are
 * listed through a third, and the name of a second thread is read through a fourth.
 */
#include "guest.h"
#include <dirent.h>
#include <pthread.h>
#include <sys/syscall.h>

static int of_thread;

static void *wait_for_the_end(void *ready) {
    of_thread = open("/proc/thread-self/comm", O_RDONLY | O_CLOEXEC);
    CHECK(of_thread >= 0);
    CHECK(pthread_setname_np(pthread_self(), "second") == 0);
    CHECK(write(*(int *)ready, "x", 1) == 1);
    for (;;) pause();
    return NULL;
}

/* What a file has now, from its beginning. */
static void read_all(int fd, char *text, size_t size) {
    ssize_t n = pread(fd, text, size - 1, 0);
    if (n < 0) fail("pread of %d", fd);
    text[n] = '\0';
}

int main(void) {
    int named = open("/proc/self/comm", O_RDWR | O_CLOEXEC);
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)getpid());
    int stat = open(path, O_RDONLY | O_CLOEXEC);
    int copy = fcntl(stat, F_DUPFD_CLOEXEC, 100);
    int directory = open("/proc/self", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *own = opendir("/proc/self/fd");
    CHECK(named >= 0 && stat >= 0 && copy >= 100 && directory >= 0 && own);
    int ends[2];
    CHECK(pipe(ends) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wait_for_the_end, &ends[1]) == 0);
    char text[4096], want[32];
    CHECK(read(ends[0], text, 1) == 1);
    say("ready 0\n");
    long round = 0;
    while (!stop_requested()) {
        round++;
        int n = snprintf(want, sizeof want, "round%ld", round);
        CHECK(write(named, want, (size_t)n) == n);
        read_all(named, text, sizeof text);
        text[strcspn(text, "\n")] = '\0';
        if (strcmp(text, want) != 0) fail("the name is %s instead of %s", text, want);
        read_all(stat, text, sizeof text);
        if (!strstr(text, want)) fail("%s is not in %s", want, text);
        /* The position is that of the description, whose copies share it. */
        CHECK(lseek(stat, round % 7, SEEK_SET) == round % 7);
        CHECK(lseek(copy, 0, SEEK_CUR) == round % 7);
        read_all(of_thread, text, sizeof text);
        if (strcmp(text, "second\n") != 0) fail("the second thread is called %s", text);
        int limits = openat(directory, "limits", O_RDONLY | O_CLOEXEC);
        CHECK(limits >= 0 && read(limits, text, sizeof text) > 0 && close(limits) == 0);
        int found = 0;
        rewinddir(own);
        for (struct dirent *entry; (entry = readdir(own));) found += atoi(entry->d_name) == copy;
        if (found != 1) fail("descriptor %d is listed %d times", copy, found);
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
