// Preloaded into a process, moves its wall clock by the nanoseconds that the file $CHAOS_CLOCK holds (int64, mapped, so
// that it can be stepped while the process runs). Clocks that measure spans go on as they are, as when a clock is set.

#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t second_ns = 1000000000;
static const volatile int64_t *offset_ns;

__attribute__((constructor)) static void map_offset() {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(nullptr, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) offset_ns = static_cast<const volatile int64_t *>(mapped);
    close(file);
}

extern "C" int clock_gettime(clockid_t clock, struct timespec *now) noexcept {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (status == 0 && offset_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = now->tv_sec * second_ns + now->tv_nsec + *offset_ns;
        now->tv_sec = ns / second_ns;
        now->tv_nsec = ns % second_ns;
    }
    return status;
}

extern "C" int gettimeofday(struct timeval *now, void *) noexcept {
    struct timespec at;
    int status = clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return status;
}

extern "C" time_t time(time_t *now) noexcept {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (now) *now = at.tv_sec;
    return at.tv_sec;
}
