/*
 * bdevio runs on three cores and v20.07 has no option to lay them on fewer processors. Linked with
 * -Wl,--wrap=rte_eal_init this replaces the core mask, on its way to DPDK, by what LLOOP_TEST_LCORES says, in the words of
 * DPDK's --lcores: "0@0,1@1,2@0".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int __real_rte_eal_init(int argc, char **argv);
int __wrap_rte_eal_init(int argc, char **argv);

int
__wrap_rte_eal_init(int argc, char **argv)
{
	static char lcores[256];
	const char *wanted = getenv("LLOOP_TEST_LCORES");
	int i;

	for (i = 1; wanted != NULL && i < argc; i++) {
		if (strncmp(argv[i], "-c ", 3) == 0 || strncmp(argv[i], "-l ", 3) == 0) {
			snprintf(lcores, sizeof(lcores), "--lcores=%s", wanted);
			argv[i] = lcores;
		}
	}
	return __real_rte_eal_init(argc, argv);
}
