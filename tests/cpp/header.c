/* The test is that this compiles: the header is self-contained C. */
#include "titans/titans.h"

typedef titans_status (*open_function)(const char*, const titans_session_options*, titans_session**);
extern const open_function titans_test_open;
const open_function titans_test_open = titans_session_open;
