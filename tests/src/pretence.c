// Loaded before libc into the processes of a stack (see pretence.rs), which it tells what the files of the folder
// LATHE_TEST_PRETENCE say: native 64-bit numbers, which may change at any time.
//
// `clock-api`, `clock-runner`: seconds by which the wall clock of `lathe api` and `lathe runner` is off.
// `free`: the free bytes of every file system; negative: as many as there are.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *offset, *free_bytes;

static const volatile int64_t* number(const char* name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", getenv("LATHE_TEST_PRETENCE"), name);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return NULL;
  void* mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
  close(file);
  return mapped == MAP_FAILED ? NULL : mapped;
}

__attribute__((constructor)) static void begin(void) {
  char command[4096] = "", name[64];
  const int own = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
  const ssize_t length = own < 0 ? -1 : read(own, command, sizeof command - 1);
  close(own);
  if (!getenv("LATHE_TEST_PRETENCE") || length <= 0) return;
  const char *slash = strrchr(command, '/'), *argument = command + strlen(command) + 1;
  if (strcmp(slash ? slash + 1 : command, "lathe") || argument >= command + length) return;
  snprintf(name, sizeof name, "clock-%s", argument);
  offset = number(name);
  free_bytes = number("free");
}

int clock_gettime(clockid_t clock, struct timespec* to) {
  const int failed = syscall(SYS_clock_gettime, clock, to);
  if (!failed && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) to->tv_sec += *offset;
  return failed;
}

int gettimeofday(struct timeval* restrict to, void* restrict zone) {
  (void)zone;
  struct timespec now;
  const int failed = clock_gettime(CLOCK_REALTIME, &now);
  if (!failed) to->tv_sec = now.tv_sec, to->tv_usec = now.tv_nsec / 1000;
  return failed;
}

time_t time(time_t* to) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  if (to) *to = now.tv_sec;
  return now.tv_sec;
}

int statvfs(const char* restrict path, struct statvfs* restrict to) {
  static int (*real)(const char*, struct statvfs*);
  if (!real) real = (int (*)(const char*, struct statvfs*))dlsym(RTLD_NEXT, "statvfs");
  const int failed = real(path, to);
  if (!failed && free_bytes && *free_bytes >= 0) to->f_bfree = to->f_bavail = *free_bytes / to->f_frsize;
  return failed;
}
