// The first program of the emulated machine: says which processor it has, runs the lines of /commands, and switches off.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int run(char **argv) {
  pid_t child = fork();
  if (child == 0) {
    execv(argv[0], argv);
    perror(argv[0]);
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(void) {
  static char line[8192];
  const char *folders[] = {"/proc", "/dev", "/tmp"};
  for (int i = 0; i < 3; i++) mkdir(folders[i], 0755);
  mount("proc", "/proc", "proc", 0, 0);
  mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
  int console = open("/dev/ttyS0", O_RDWR);
  for (int fd = 0; console >= 0 && fd < 3; fd++) dup2(console, fd);
  setvbuf(stdout, 0, _IOLBF, 0);

  FILE *cpu = fopen("/proc/cpuinfo", "r");
  while (cpu && fgets(line, sizeof line, cpu))
    if (!strncmp(line, "model name", 10) || !strncmp(line, "flags", 5)) fputs(line, stdout);

  FILE *commands = fopen("/commands", "r");
  int ran = 0, failed = 0;
  while (commands && fgets(line, sizeof line, commands)) {
    char *argv[64];
    int n = 0;
    printf("=== %s", line);
    for (char *word = strtok(line, " \n"); word && n < 63; word = strtok(0, " \n")) argv[n++] = word;
    argv[n] = 0;
    if (n == 0) continue;
    ran++;
    failed += run(argv) != 0;
  }
  printf("=== all done: %d ran, %d failed\n", ran, failed);
  sleep(1);
  // The port by which Bochs is switched off.
  if (!iopl(3))
    for (const char *c = "Shutdown"; *c; c++) outb(*c, 0x8900);
  for (;;) pause();
}
